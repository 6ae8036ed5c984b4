"""Local federation to try a deployment out: server and sites on this machine, a site for each client."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from ..core.errors import DeploymentError
from ..core.files import read_json, write_json, write_text
from ..data.build import build_data, with_builtin_columns
from ..data.conversations import Message, as_rows
from ..data.examples import Example, FederatedData
from ..data.party_data import OwnDataSettings
from ..federated.build import check_cohort
from ..federated.callbacks import Callback
from ..federated.fingerprint import files_of
from ..federated.resolve import resolved
from ..recipe.recipe import Recipe
from .nvflare.kits import provision, require_nvflare
from .nvflare.supervision import SupervisedProcess
from .run import run_deployed
from .settings import FederationSettings, save_federation
from .site.models import is_local
from .site.policy import models_of

PREPARED = "prepared.json"
"""What the sites in a folder were made from."""

MAX_SITES = 32
"""Sites that one machine may run: each takes three processes and a base model."""


def run_locally(
    recipe: Recipe,
    folder: Path,
    directory: Path,
    *,
    port: int,
    resume: bool,
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:
    """Run a recipe with a server and sites on this machine, over mutual TLS.

    The recipe's data are split as in a simulation; each client's part is written to its site's folder in
    ``folder``, and the site knows of no other.

    Raises:
        DeploymentError: too many clients for one machine, the folder holds other rows, or see
            :func:`run_deployed`.
    """
    require_nvflare()
    if not (folder / "federation.toml").exists():
        files = files_of(recipe)
        prepare(resolved(recipe), folder, port)
        write_json(folder / PREPARED, {**_prepared(recipe, port), "files": files})
    check_prepared(recipe, folder, port)
    with local_sites(folder):
        return run_deployed(recipe, folder, directory, resume=resume, callbacks=callbacks)


def check_prepared(recipe: Recipe, folder: Path, port: int) -> None:
    """Refuse a folder whose sites hold other rows than the recipe names now.

    Raises:
        DeploymentError: data, clients, seed or port are others, or a file of the data has another content.
    """
    found = read_json(folder / PREPARED) if (folder / PREPARED).exists() else {}
    files = found.pop("files", {})
    if found != _prepared(recipe, port):
        raise DeploymentError(
            f"{folder}: holds the sites of other data, clients, seed or port; remove it or name another --out"
        )
    for path, digest in files_of(recipe).items():
        if files.get(path, digest) != digest:
            raise DeploymentError(
                f"{folder}: holds the sites of other rows: {path} has changed since; remove it or name "
                "another --out"
            )


def _prepared(recipe: Recipe, port: int) -> dict[str, Any]:
    """What a local federation's sites were made from, but for the content of files."""
    settings = resolved(recipe).model_dump(mode="json", include={"data", "clients", "public", "seed"})
    return {"port": port, **settings}


def prepare(recipe: Recipe, folder: Path, port: int, threads: int = 1) -> FederationSettings:
    """Provision a federation on this machine whose sites hold the recipe's clients' data."""
    settings, clients = with_builtin_columns(recipe.data, recipe.clients)
    data = build_data(settings, clients, recipe.seed, recipe.public)
    check_cohort(recipe, data)
    if len(data.clients) > MAX_SITES:
        raise DeploymentError(
            f"clients: {len(data.clients)} sites on one machine; at most {MAX_SITES}: lower clients.count"
        )
    provision(folder, "localhost", port, list(data.clients))
    from .nvflare.certificates import restrict_permissions

    for name, client in data.clients.items():
        kit = folder / "sites" / name
        parts = {"train": client.train, "development": client.development, "test": client.test}
        own = write_parts(kit / "data", parts | {"public": data.public}, data)
        write_text(kit / "data" / "site.toml", local_site_file(own, data, recipe, threads))
    is_retrieval = recipe.data.task == "retrieval"
    shared = write_parts(
        folder / "data",
        {
            # Questions come from the server, for only it may ask all sites.
            "development": data.development if recipe.data.development or is_retrieval else [],
            "test": data.test if is_retrieval or not data.test_is_pooled else [],
            "public": data.public,
        },
        data,
    )
    paths = {part: f"data/{value}" for part in PARTS if (value := getattr(shared, part)) is not None}
    federation = FederationSettings(
        server="localhost",
        port=port,
        sites=list(data.clients),
        start_with=len(data.clients),
        data=shared.model_copy(update=paths),
    )
    save_federation(folder, federation)
    restrict_permissions(*(folder / "sites" / name for name in data.clients))
    return federation


def local_site_file(own: OwnDataSettings, data: FederatedData, recipe: Recipe, threads: int) -> str:
    """The ``site.toml`` of a site on this machine: complete, and open to every method, since one person owns
    all of it. What a site of others would give away is for that site to choose.
    """
    declared = own.model_dump(exclude_none=True)
    if data.task.kind == "classification":
        declared |= {"columns": ["text", "label"], "labels": list(data.task.labels)}
    elif data.task.preference:
        declared |= {"columns": ["prompt", "chosen", "rejected"]}
    else:
        given = ["messages"] if data.task.chat else ["text", "target"]
        declared |= {"columns": [*given, "references", *(["options"] if own.options else [])]}
    policy: dict[str, Any] = dict.fromkeys(("sums", "logits", "vectors", "texts", "chat_templates"), True)
    policy |= dict.fromkeys(("least_examples", "least_batch_size", "least_label_examples"), 1)
    policy |= {"max_top": 1000, "max_queries_per_day": 1_000_000}
    models = [name for name, _ in models_of(recipe)]
    if any(is_local(name) for name in models):
        policy["base_models"] = [f"{n}@{v}" if v else n for n, v in models_of(recipe)]
    note = "# Written by fedcustom deploy local. All sites are on this machine: the policy allows all.\n"
    return note + tomli_w.dumps({"threads": threads, "data": declared, "policy": policy})


PARTS = ("train", "development", "test", "public")


def write_parts(folder: Path, parts: Mapping[str, Sequence[Example]], data: FederatedData) -> OwnDataSettings:
    """Write examples as files that a party can name, and the settings that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    paths: dict[str, Any] = {"split": False}
    for part, examples in parts.items():
        if not examples:
            continue
        rows = (json.dumps(_row(example, data), ensure_ascii=False) + "\n" for example in examples)
        write_text(folder / f"{part}.jsonl", "".join(rows))
        paths[part] = f"{part}.jsonl"
    if data.task.kind == "classification":
        return OwnDataSettings(**paths, text="{text}", label="label")
    if data.task.preference:
        return OwnDataSettings(**paths, prompt="{prompt}", chosen="{chosen}", rejected="{rejected}")
    has_options = any(example.options for examples in parts.values() for example in examples)
    paths |= {"references": "references"} | ({"options": "options"} if has_options else {})
    if data.task.chat:
        return OwnDataSettings(**paths, messages="messages")
    return OwnDataSettings(**paths, prompt="{text}", target="{target}")


def _row(example: Example, data: FederatedData) -> dict[str, Any]:
    if data.task.kind == "classification":
        label = data.task.labels[example.label] if example.label >= 0 else ""
        return {"text": example.text, "label": label}
    if data.task.preference:
        prompt = as_rows(example.messages)
        return {"prompt": prompt, "chosen": example.target, "rejected": example.rejected}
    scores = {"references": list(example.references)}
    scores |= {"options": list(example.options)} if example.options else {}
    if data.task.chat:
        messages = (*example.messages, Message("assistant", example.target))
        return {"messages": as_rows(messages), **scores}
    return {"text": example.text, "target": example.target, **scores}


@contextlib.contextmanager
def local_sites(folder: Path) -> Iterator[dict[str, SupervisedProcess]]:
    """Run every site of a federation on this machine, each as ``fedcustom site start`` does."""
    supervised = {}
    for kit in sorted((folder / "sites").iterdir()):
        command = [sys.executable, "-m", "fedcustom", "site", "start", str(kit), "--data"]
        supervised[kit.name] = SupervisedProcess(
            [*command, str(kit / "data" / "site.toml")], kit / "fedcustom" / "site.log"
        )
    try:
        for process in supervised.values():
            process.start()
        yield supervised
    finally:
        for process in supervised.values():
            process.stop()
