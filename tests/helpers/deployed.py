"""A federation on this machine for tests: a server, sites, and ways to hurt them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import tomli_w

from fedcustom.deployment.local import prepare
from fedcustom.deployment.nvflare.bridge import ADDRESS_VARIABLE, BridgeError, BridgeListener
from fedcustom.deployment.nvflare.kits import site_command
from fedcustom.deployment.nvflare.supervision import SupervisedProcess
from fedcustom.deployment.run import run_deployed
from fedcustom.deployment.settings import load_federation, save_federation
from fedcustom.deployment.site.resident import Resident
from fedcustom.deployment.site.secure_sums import kit_identity
from fedcustom.deployment.site.settings import load_site
from fedcustom.federated.callbacks import Callback
from fedcustom.federated.resolve import resolved
from fedcustom.recipe.recipe import load_recipe


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def processes(*words: str) -> list[int]:
    """Processes whose command line holds all the words."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if all(word in line for word in words):
                    found.append(int(folder.name))
    return found


def kill(pids: list[int], number: int = signal.SIGKILL) -> None:
    assert pids, "nobody to hurt"
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


class Watcher(Callback):
    """A progress that does something when a round has ended, and keeps what it was told."""

    def __init__(self, after: Mapping[int, Callable[[], None]] | None = None) -> None:
        self.after, self.notes, self.times = dict(after or {}), list[str](), dict[int, float]()
        self.done = 0

    def on_run_start(self, recipe: Any, done: int, directory: Path) -> None:
        self.done = done

    def on_round_end(self, row: dict[str, Any]) -> None:
        self.times[row["round"]] = time.monotonic()
        if row["round"] in self.after:
            self.after.pop(row["round"])()

    def on_note(self, text: str) -> None:
        self.notes.append(f"{time.monotonic():.1f} {text}")


class Bed:
    """A provisioned federation whose sites hold the recipe's clients' data."""

    def __init__(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        self.folder, self.recipe = folder, dict(recipe)
        prepare(resolved(load_recipe(self.recipe)), folder, free_port())
        self.names = list(load_federation(folder).sites)
        for name in self.names:
            self.allow_models(name)
        self.sites: dict[str, SupervisedProcess] = {}
        self.patience(round_seconds=120.0, grace_seconds=12.0, quorum_seconds=120.0)

    def patience(self, **changes: Any) -> None:
        save_federation(self.folder, load_federation(self.folder).model_copy(update=changes))

    def kit(self, name: str) -> Path:
        return self.folder / "sites" / name

    def allow_models(self, name: str) -> None:
        """Let a site load the folders beside the recipe's model too: tests try several."""
        file = self.kit(name) / "data" / "site.toml"
        content = tomllib.loads(file.read_text())
        if models := content["policy"].get("base_models"):
            beside = [str(path) for model in models for path in Path(model).parent.parent.glob("models*/*")]
            content["policy"]["base_models"] = sorted({*models, *beside})
            file.write_text(tomli_w.dumps(content))

    def own(self, name: str) -> Path:
        return self.kit(name) / "fedcustom"

    def start(self, *names: str, options: Sequence[str] = ()) -> None:
        for name in names or self.names:
            command = [sys.executable, "-m", "fedcustom", "site", "start", str(self.kit(name)), "--data"]
            command += [str(self.kit(name) / "data" / "site.toml"), *options]
            self.sites[name] = SupervisedProcess(command, self.own(name) / "site.log")
            self.sites[name].start()

    def start_and_wait(self, name: str, seconds: float = 180.0) -> None:
        """Start a site while a run goes on, and wait until it has registered with the server."""
        log, said = self.folder / "server" / "fedcustom" / "engine.log", f"New client {name}@"
        before = log.read_text(errors="replace").count(said)
        self.start(name)
        until = time.monotonic() + seconds
        while log.read_text(errors="replace").count(said) == before:
            assert time.monotonic() < until, f"{name} does not connect"
            time.sleep(0.2)

    def engine(self, name: str) -> list[int]:
        """The engine's process at a site that stays."""
        return processes("client_train", f"uid={name}", str(self.folder))

    def job(self, name: str) -> list[int]:
        """The engine's process at a site that belongs to a job."""
        return processes("client.worker_process", str(self.kit(name)))

    def resident(self, name: str) -> list[int]:
        return processes("fedcustom.deployment.site", str(self.kit(name)))

    def server(self) -> list[int]:
        return processes("server_train", str(self.folder / "server"))

    def kill_site(self, name: str) -> None:
        """Everything at a site, as if its machine lost power."""
        supervisor = self.sites.pop(name).process
        pids = [*self.engine(name), *self.job(name), *self.resident(name)]
        kill([*([supervisor.pid] if supervisor else []), *pids])
        if supervisor is not None:
            supervisor.wait()

    def stop(self) -> None:
        for kept in self.sites.values():
            kept.stop()
        for pid in processes(str(self.folder)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def run(self, out: Path, watcher: Watcher | None = None, **changes: Any) -> dict[str, Any]:
        recipe = load_recipe(self.recipe, {key.replace("__", "."): value for key, value in changes.items()})
        resume = (out / "recipe.toml").exists()
        return run_deployed(recipe, self.folder, out, resume=resume, callbacks=[watcher or Watcher()])

    def audit(self, name: str) -> list[dict[str, Any]]:
        """What a site has logged so far: nothing before its first run."""
        log = self.own(name) / "audit.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


@contextlib.contextmanager
def bed(folder: Path, recipe: Mapping[str, Any], *, start: bool = True) -> Iterator[Bed]:
    made = Bed(folder, recipe)
    try:
        if start:
            made.start()
        yield made
    finally:
        made.stop()


class Hostile(Resident):
    """A site that does as it should until told otherwise: ``tricks`` spoil its answer in a round."""

    tricks: ClassVar[dict[int, Callable[[dict[str, Any]], None]]] = {}

    def handle(self, message: dict[str, Any]) -> dict[str, Any]:
        answer = super().handle(message)
        if message.get("kind") == "work" and (trick := self.tricks.get(message.get("round") or 0)):
            trick(answer)
        return answer


@contextlib.contextmanager
def hostile(made: Bed, name: str, tricks: dict[int, Callable[[dict[str, Any]], None]]) -> Iterator[None]:
    """A site whose resident process is hostile, behind the real engine."""
    file = made.kit(name) / "data" / "site.toml"
    Hostile.tricks = tricks
    identify = kit_identity(made.kit(name), ())
    resident = Hostile(name, load_site(file), file.parent, made.own(name), identify=identify)
    listener = BridgeListener(made.own(name) / "bridge.json")

    def serve() -> None:
        with contextlib.suppress(BridgeError):
            resident.serve(listener)

    threading.Thread(target=serve, daemon=True).start()
    engine = SupervisedProcess(
        site_command(made.kit(name)), made.own(name) / "engine.log", {ADDRESS_VARIABLE: str(listener.file)}
    )
    engine.start()
    try:
        yield
    finally:
        engine.stop()
        listener.close()


def metrics(out: Path) -> list[dict[str, Any]]:
    """The rounds of a run, but for a line that is being written."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().split("\n")[:-1]]


def command(*arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    """The command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "fedcustom", *arguments],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | environment, start_new_session=True,
    )  # fmt: skip
