"""A deployed run at the server: its engine is kept alive, the run driven over as many jobs as it takes."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import DeploymentError
from ..core.files import held, holder
from ..federated.callbacks import Callback, Callbacks
from ..federated.run import run_recipe
from ..federated.simulation import Federation
from ..recipe.recipe import Recipe
from .nvflare.bridge import ADDRESS_VARIABLE, BridgeListener
from .nvflare.jobs import Session
from .nvflare.kits import require_nvflare, server_command
from .nvflare.link import Link
from .nvflare.sites import Patience, Sites
from .nvflare.supervise import SupervisedProcess, keep_alive
from .parties import check_deployable, gather
from .settings import FederationSettings, load_federation

RUNNING = "run.pid"


def run_deployed(
    recipe: Recipe, folder: Path, directory: Path, *, resume: bool = False, callbacks: Sequence[Callback] = ()
) -> dict[str, Any]:
    """Run a recipe with a federation's sites, into a run directory, and return its summary.

    The folder is the federation's; its server runs on this machine as long as the run does, and is started
    again if it dies. A run that is stopped goes on with ``resume``.

    Raises:
        DeploymentError: the folder holds no federation, another run uses it, or too few sites take part.
        FedcustomError: see :func:`fedcustom.federated.run.run_recipe`.
    """
    require_nvflare()
    settings = load_federation(folder)
    complete = recipe.complete()
    check_deployable(complete)
    with _alone(folder), serving(folder, settings, Callbacks(callbacks).on_note) as sites:

        def parties(recipe: Recipe, directory: Path, private: Path, told: Callback) -> Federation:
            told.on_phase("waiting for the sites")
            return gather(recipe, settings, folder, sites, directory)

        return run_recipe(complete, directory, resume=resume, callbacks=callbacks, gather=parties)


@contextlib.contextmanager
def serving(folder: Path, settings: FederationSettings, note: Callable[[str], None]) -> Iterator[Sites]:
    """The federation's server, kept alive, and its sites as they come."""
    kit = (folder / "server").absolute()
    own = kit / "fedcustom"
    door = BridgeListener(own / "bridge.json")
    engine = SupervisedProcess(
        server_command(kit), own / "engine.log", {ADDRESS_VARIABLE: str(door.file), "MALLOC_ARENA_MAX": "2"}
    )
    ended = threading.Event()
    patience = Patience(settings.round_seconds, settings.grace_seconds, settings.quorum_seconds)
    link = Link((folder / "admin").absolute(), door, note)

    def keep() -> None:
        if not keep_alive([engine], note, ended.is_set):
            link.given_up = f"the server's engine does not start; its log is {own / 'engine.log'}"

    keeper = threading.Thread(target=keep, daemon=True)
    keeper.start()
    most = int(settings.max_message_megabytes * 1e6)
    sites = Sites(link, own / "spool", patience, most, note)
    try:
        yield sites
    finally:
        sites.close()
        ended.set()
        keeper.join(timeout=20.0)


def status(folder: Path) -> dict[str, Any]:
    """Whether a run is under way, and which sites are connected.

    Raises:
        DeploymentError: the folder holds no federation.
    """
    settings, pid = load_federation(folder), _running(folder)
    session = Session((folder / "admin").absolute())
    try:
        connected: list[str] | None = session.connected() if pid is not None else None
    except DeploymentError:
        connected = None
    finally:
        session.close()
    return {"process": pid, "sites": settings.sites, "connected": connected}


def stop(folder: Path) -> bool:
    """Ask a run that is under way to stop as Ctrl-C does; whether there was one."""
    import signal

    load_federation(folder)
    pid = _running(folder)
    if pid is None:
        return False
    os.kill(pid, signal.SIGTERM)
    return True


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the federation for one run."""
    with held(folder / RUNNING) as alone:
        if not alone:
            other = _running(folder)
            raise DeploymentError(f"{folder}: process {other} runs with this federation; stop it first")
        yield


def _running(folder: Path) -> int | None:
    """The process that runs with the federation, if one does."""
    return holder(folder / RUNNING)
