"""A worker of a simulation: a resident process that does clients' tasks, on a base model of its own."""

from __future__ import annotations

import hashlib
import json
import os
import time
import tomllib
import traceback
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..core.errors import DataError, RunError
from ..methods.messages import Update
from ..methods.protocol import Client, CountsCuts, Memory, State
from ..models.load import Base
from ..recipe.recipe import Recipe, parse_recipe, to_toml
from ..transport.receiving import shared_out, work_of
from ..transport.workers.messages import ClientAnswer, decode_request, encode_answer, encode_failure
from ..transport.workers.pool import Setup
from .client_side import ClientSide, client_side, read_data
from .fingerprint import Fingerprint, of_data
from .private_run import PrivateRun

MESSAGES = 16
"""Messages as large as the state for which Ray's object store has room; it writes others to disk."""

COMPARED = ("fedcustom", "torch", "transformers", "peft")
"""Packages that a worker must have in the same version as the run's process."""


class ClientWorker:
    """What one of Ray's processes does; its arguments and results are bytes and texts."""

    def __init__(self, threads: int) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        torch.set_num_threads(threads)
        self.side: ClientSide

    def ready(self) -> int:
        """The process's number, once it has its place."""
        return os.getpid()

    def load(self, settings: str) -> str:
        """Read the data and load the base model; returns, as JSON, what the run's process compares with its
        own.

        Raises:
            FedcustomError: they cannot be read or loaded here.
        """
        told = json.loads(settings)
        recipe = _for_device(parse_recipe(tomllib.loads(told["recipe"]), "recipe"), told)
        read = read_data(recipe)
        rows = of_data(recipe, read.data)
        private = PrivateRun.restored(recipe, told["private"], len(read.data.clients))
        self.side = client_side(recipe, read, private.own_noise if private is not None else None)
        self.side.method.initialise()  # which some methods make their parts in
        self.home = told["directory"]
        return json.dumps(_found(rows))

    def work(self, head: bytes, memories: list[bytes], *tensors: bytes) -> list[ClientAnswer]:
        """The answers of several clients, trained in one batch where the method does that."""
        method = self.side.method
        asked = decode_request(method.messages, head, memories, tensors)
        clients = [self._client(one.name, one.folder, one.memory) for one in asked]
        started = time.perf_counter()
        answers = work_of(method, [(one.task, client) for one, client in zip(asked, clients, strict=True)])
        seconds = shared_out(time.perf_counter() - started, clients)
        return [
            _encoded(answer, client, own)
            for answer, client, own in zip(answers, clients, seconds, strict=True)
        ]

    def cuts(self) -> list[str]:
        """What the method cut or left out since the last call, in sentences."""
        method = self.side.method
        return method.take_cuts() if isinstance(method, CountsCuts) else []

    def _client(self, name: str, folder: str | None, memory: Memory) -> Client:
        """A client; it has its folder where this machine sees the run's directory."""
        place = Path(folder) if folder is not None and Path(self.home).is_dir() else None
        return Client(name, self.side.clients[name], memory, place)


def _encoded(answer: Update | Exception, client: Client, seconds: float) -> ClientAnswer:
    """An answer as it travels. One that cannot travel is a failure of its client."""
    try:
        if isinstance(answer, Exception):
            raise answer
        return encode_answer(answer, client.memory, seconds)
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        return encode_failure(reason, traceback.format_exc(), seconds)


def _for_device(recipe: Recipe, told: Mapping[str, Any]) -> Recipe:
    """The recipe with the device that the worker has, and the precision that the run's process uses."""
    model = recipe.model
    change: dict[str, Any] = {"dtype": told["precision"]} if model.dtype == "auto" else {}
    if model.device_map is None and (told["device"] == "cuda" or model.device == "auto"):
        change["device"] = told["device"]
    return recipe.model_copy(update={"model": model.model_copy(update=change)}) if change else recipe


def _found(rows: Fingerprint) -> dict[str, Any]:
    content = json.dumps(rows, sort_keys=True).encode()
    versions = {name: metadata.version(name) for name in COMPARED}
    return {"rows": hashlib.sha256(content).hexdigest(), "packages": versions}


def worker_setup(
    recipe: Recipe,
    base: Base,
    origin: State,
    rows: Fingerprint,
    private: PrivateRun | None,
    directory: Path,
) -> Setup:
    """What the workers of a run are made of.

    Args:
        recipe: complete, with absolute paths, which workers open too.
        base: as the run's process loaded it.
        origin: the first state, by whose size Ray's memory for messages is chosen.
        rows: of the data as they were read there.
        private: where clients are hidden by noise; workers get its key, since clients' noise is made there.
        directory: the run's.
    """
    own = _found(rows)

    def check(found: Mapping[str, Any]) -> None:
        for name, version in own["packages"].items():
            if found["packages"][name] != version:
                raise RunError(
                    f"workers: a worker has {name} {found['packages'][name]}, and this process {version}; "
                    "install the same on all nodes"
                )
        if found["rows"] != own["rows"]:
            raise DataError(
                "workers: a worker reads other rows than this process at the recipe's paths; the data "
                "must be the same on all nodes"
            )

    settings = {
        "recipe": to_toml(recipe.model_copy(update={"workers": None, "tracking": None})),
        "precision": base.precision,
        "private": private.to_values() if private is not None else None,
        "directory": str(directory.absolute()),
    }
    state = sum(tensor.numel() * tensor.element_size() for tensor in origin.tensors.values())
    return Setup(ClientWorker, settings, check, base.device.type != "cpu", MESSAGES * state)
