"""Deployed runs at the server: the engine is supervised, and the run driven over a chain of its jobs."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from ..core.errors import DeploymentError, RecipeError
from ..core.files import held, holder
from ..federated.callbacks import Callback, Callbacks
from ..federated.resolve import resolved
from ..federated.run import run_recipe
from ..federated.simulation import Federation
from ..recipe.recipe import Recipe
from ..updates.transform import UpdateTransform
from .membership import Membership, check_certificates
from .nvflare.bridge import ADDRESS_VARIABLE, BridgeListener
from .nvflare.job_channel import JobChannel
from .nvflare.jobs import Session
from .nvflare.kits import require_nvflare, server_command
from .nvflare.messenger import Messenger, Timeouts
from .nvflare.supervision import SupervisedProcess, keep_alive
from .parties import check_deployable, gather
from .settings import FederationSettings, load_federation

LOCK_FILE = "run.pid"
"""File in the federation's folder that names the process of the run under way."""


def run_deployed(
    recipe: Recipe,
    folder: Path,
    directory: Path,
    *,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    data_changed: Literal["refuse", "accept"] = "refuse",
) -> dict[str, Any]:
    """Run a recipe with a federation's sites, into a run directory, and return its summary.

    The folder is the federation's; its server runs on this machine as long as the run does, and is started
    again if it dies. A run that is stopped goes on with ``resume``, with other rows of the server's own where
    ``data_changed`` is ``"accept"``; each site decides on its own rows.

    Raises:
        DeploymentError: the folder holds no federation, another run uses it, or too few sites take part.
        FedcustomError: see :func:`fedcustom.federated.run.run_recipe`.
    """
    require_nvflare()
    settings, told = load_federation(folder), Callbacks(callbacks)
    complete = resolved(recipe)
    check_deployable(complete)
    with _locked(folder), serving(folder, settings, told.on_note) as messenger:

        def parties(
            recipe: Recipe,
            directory: Path,
            private: Path,
            callback: Callback,
            transforms: Sequence[UpdateTransform],
        ) -> Federation:
            if transforms:
                raise RecipeError("transforms: sites apply what the recipe names, and no caller's own")
            callback.on_phase("waiting for the sites")
            return gather(recipe, settings, folder, messenger, directory)

        return run_recipe(
            complete,
            directory,
            resume=resume,
            callbacks=told,
            gather=parties,
            data_changed=data_changed,
        )


@contextlib.contextmanager
def serving(folder: Path, settings: FederationSettings, note: Callable[[str], None]) -> Iterator[Messenger]:
    """Keep the federation's server running, and give the messenger to its sites."""
    from .nvflare.certificates import restrict_permissions

    check_certificates(folder, note)
    kit = (folder / "server").absolute()
    own = kit / "fedcustom"
    own.mkdir(exist_ok=True, mode=0o700)
    restrict_permissions(kit, folder / "admin")
    listener = BridgeListener(own / "bridge.json")
    environment = {ADDRESS_VARIABLE: str(listener.file), "MALLOC_ARENA_MAX": "2"}
    engine = SupervisedProcess(server_command(kit), own / "engine.log", environment)
    ended = threading.Event()
    timeouts = Timeouts(settings.round_seconds, settings.grace_seconds, settings.quorum_seconds)
    channel = JobChannel((folder / "admin").absolute(), listener, note, Membership(folder, note))

    def supervise() -> None:
        if not keep_alive([engine], note, ended.is_set):
            channel.engine_failure = f"the server's engine does not start; its log is {own / 'engine.log'}"

    supervisor = threading.Thread(target=supervise, daemon=True)
    supervisor.start()
    max_bytes = int(settings.max_message_megabytes * 1e6)
    messenger = Messenger(channel, own / "spool", timeouts, max_bytes, note)
    try:
        yield messenger
    finally:
        messenger.close()
        ended.set()
        supervisor.join(timeout=20.0)
        restrict_permissions(kit, folder / "admin")


def status(folder: Path) -> dict[str, Any]:
    """Whether a run is under way, and which sites are connected.

    Raises:
        DeploymentError: the folder holds no federation.
    """
    settings, pid = load_federation(folder), running(folder)
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
    pid = running(folder)
    if pid is None:
        return False
    os.kill(pid, signal.SIGTERM)
    return True


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the federation for one run.

    Raises:
        DeploymentError: another run uses it.
    """
    with held(folder / LOCK_FILE) as acquired:
        if not acquired:
            other = running(folder)
            raise DeploymentError(f"{folder}: process {other} runs with this federation; stop it first")
        yield


def running(folder: Path) -> int | None:
    """The process that runs with the federation, if one does."""
    return holder(folder / LOCK_FILE)
