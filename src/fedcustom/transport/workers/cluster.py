"""Ray on this machine for one run alone, or a cluster that runs already."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...core.environment import free_memory
from ...core.errors import RecipeError, RunError
from .settings import WorkerSettings

INSTALL = "pip install 'fedcustom[ray]'"

LEAST_STORE = 128 * 2**20
"""Bytes of Ray's object store at least, on this machine."""

LONGEST_FOLDER = 40
"""Characters of Ray's folder: longer ones leave no room for the names of its sockets."""

TOKEN = secrets.token_hex(32)
"""The token of this process's own clusters, without which nobody can connect to one."""

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_TOKEN": TOKEN,
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Variables of the environment as long as a cluster of our own runs: it reports nothing to anybody, and takes
no commands without the token (Ray's default for a cluster of one process; without a token in the environment
it would write one into the user's home). What a user has set stays."""

MODE = "RAY_AUTH_MODE"
"""The variable that Ray sets when it uses a token."""


def library() -> Any:
    """Ray.

    Raises:
        RecipeError: it is not installed; says how it is.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise RecipeError(f"workers.count: needs the package ray: {INSTALL}") from None
    return ray


def check_installed() -> None:
    """Refuse workers where Ray is not installed, before anything is loaded.

    Raises:
        RecipeError: says how it is.
    """
    import importlib.util

    if importlib.util.find_spec("ray") is None:
        raise RecipeError(f"workers.count: needs the package ray: {INSTALL}")


@dataclass(frozen=True)
class Share:
    """What each worker has: cores that Ray keeps for it, GPUs, and threads."""

    cpus: int
    gpus: float
    threads: int


class Cluster:
    """A connection to Ray, and what each of ``count`` workers may take there.

    Without ``workers.address`` a cluster is started on this machine, for as long as the connection lasts. It
    listens to nobody without its token, has no dashboard, reports nothing, and its files, in a folder that is
    removed in the end, are those of messages that did not fit into ``store`` bytes of memory. Where the
    process has a connection to Ray already, that is used, and stays.

    Raises:
        RunError: the cluster cannot be reached, or has not enough cores or GPUs.
    """

    def __init__(self, settings: WorkerSettings, count: int, *, accelerated: bool, store: int) -> None:
        self.settings, self.count = settings, count
        self._folder: Path | None = None
        self._set: list[str] = []
        if settings.address is None:
            self._prepare()
        self.ray = library()
        self._connected = not self.ray.is_initialized()
        try:
            if self._connected:
                with _signals_kept():
                    self._connect(store)
            self.share = self._shared(accelerated)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Take down a cluster of our own, or leave another one."""
        if self._connected:
            with contextlib.suppress(Exception):
                self.ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        for key in self._set:
            os.environ.pop(key, None)
        self._set, self._folder, self._connected = [], None, False

    def _prepare(self) -> None:
        """Set the environment of a cluster of our own: Ray reads it when it is imported."""
        self._set = [key for key in QUIET if key not in os.environ]
        os.environ.update({key: QUIET[key] for key in self._set})
        self._set += [MODE] if MODE not in os.environ else []

    def _connect(self, store: int) -> None:
        quiet = {"log_to_driver": False, "logging_level": "ERROR"}
        try:
            if (address := self.settings.address) is not None:
                self.ray.init(address=address, **quiet)
                return
            self._folder = _short_folder()
            room = max(LEAST_STORE, min(store, free_memory(torch.device("cpu")) // 4))
            self.ray.init(
                address="local",
                num_cpus=self.count * self._cpus(),
                include_dashboard=False,
                object_store_memory=room,
                _temp_dir=str(self._folder),
                _node_ip_address="127.0.0.1",
                **quiet,
            )
        except (ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
            where = "on this machine" if self.settings.address is None else f"at {self.settings.address}"
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RunError(f"workers: no Ray {where}: {reason}") from None

    def _cpus(self) -> int:
        if self.settings.cpus is not None:
            return self.settings.cpus
        if self.settings.address is not None:
            return 1
        return max(1, torch.get_num_threads() // self.count)

    def _shared(self, accelerated: bool) -> Share:
        """What each worker gets of what there is."""
        there, cpus, gpus = self.ray.cluster_resources(), self._cpus(), self.settings.gpus
        if gpus is None:
            found = float(there.get("GPU", 0))
            gpus = (1.0 if found >= self.count else found / self.count) if accelerated else 0.0
            if 0 < gpus < 1:
                gpus = 1 / math.ceil(1 / gpus)  # a whole number of workers on each
        for key, kind, each in (("cpus", "CPU", cpus), ("gpus", "GPU", gpus)):
            if each * self.count > there.get(kind, 0) + 1e-6:
                raise RunError(
                    f"workers.count = {self.count}: with workers.{key} = {each:g} they need "
                    f"{each * self.count:g} {kind}s, and Ray has {there.get(kind, 0):g}"
                )
        return Share(cpus, gpus, self.settings.threads or cpus)


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Afterwards SIGTERM does what it did before: Ray would end the process by itself."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)


def _short_folder() -> Path:
    """A new folder for Ray, whose sockets bear no long path."""
    usual = tempfile.gettempdir()
    place = usual if len(usual) + 12 <= LONGEST_FOLDER else "/tmp"
    return Path(tempfile.mkdtemp(prefix="fc-ray-", dir=place))
