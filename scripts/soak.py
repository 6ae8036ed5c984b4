"""Soak test of a deployed run on this machine: processes of every kind are killed at random, and the result
is compared with the same run in process.

    python scripts/soak.py --sites 3 --rounds 20 --kills 8 --seed 0
    python scripts/soak.py --sites 8 --rounds 300 --kills 60 --seed 1 --out soak

Every kill is SIGKILL. The kinds: a site's resident, its job, its engine, its supervisor (``fedcustom site
start``), the server's engine, the server's job, and the run itself (``fedcustom deploy run``, continued with
``--resume``). Memory, threads and descriptors are sampled by kind of process, and the space on disk.

Writes ``soak.json`` into ``--out`` and prints its tables. Ends with code 0 if all rounds are there and no
tensor differs, 1 otherwise; after ``--max-minutes`` in any case. All processes are ended, whatever happens.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from measure_deployment import write_data, write_model

from fedcustom.core import environment
from fedcustom.core.files import TEMPORARY, write_json, write_text
from fedcustom.deployment.local import prepare
from fedcustom.deployment.nvflare.supervision import SupervisedProcess, keep_alive
from fedcustom.deployment.settings import load_federation, save_federation
from fedcustom.federated.resolve import resolved
from fedcustom.federated.run_directory import Checkpoints
from fedcustom.recipe.recipe import load_recipe, to_toml

KINDS = {
    "run": ("fedcustom deploy run", "{federation}"),
    "server engine": ("server_train", "{federation}/server"),
    "server job": ("server.runner_process", "{federation}/server"),
    "site supervisor": ("fedcustom site start", "{federation}/sites/"),
    "site resident": ("fedcustom.deployment.site ", "{federation}/sites/"),
    "site engine": ("client.client_train", "{federation}/sites/"),
    "site job": ("client.worker_process", "{federation}/sites/"),
}
"""Words in the command line of each kind of process."""

LOG = re.compile(r".*\.log|log.*\.txt.*")
"""Names of files that grow by lines."""

TIMEOUT = 900.0
"""Seconds that a round may take. Every round needs every site, for the result to be that of the run in
process.
"""

RECOVERY_TIMEOUT = 300.0
"""Seconds after a kill, without a round, after which the next kill comes all the same."""

MAX_FAILED_RUNS = 3
"""Ends of the run with an error of its own, in a row without a new round, after which the soak gives up."""


@dataclass
class Kill:
    """A process that was killed, after ``round`` rounds, and the seconds until a round had ended again."""

    kind: str
    round: int
    at: float = 0.0
    process: int = 0
    skipped: str = ""
    seconds: float | None = None


@dataclass
class Sample:
    """Largest resident memory, threads and descriptors of each kind of process, and what lies on the disk."""

    at: float
    rounds: int
    kinds: dict[str, dict[str, float]] = field(default_factory=dict)
    disk: dict[str, float] = field(default_factory=dict)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sites", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS), help="kinds of process to kill, by commas")
    parser.add_argument(
        "--out", type=Path, help="folder for the result and all logs; default: a temporary one"
    )
    parser.add_argument("--max-minutes", type=float, default=240.0)
    parser.add_argument("--every", type=float, default=2.0, help="seconds between samples")
    chosen = parser.parse_args()
    kinds = chosen.kinds.split(",")
    if unknown := set(kinds) - KINDS.keys():
        parser.error(f"--kinds: {', '.join(sorted(unknown))}: allowed are {', '.join(KINDS)}")
    if not 2 <= chosen.sites <= 32 or chosen.rounds < 2 or chosen.kills < 0:
        parser.error("--sites 2 to 32, --rounds 2 or more, --kills 0 or more")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with contextlib.ExitStack() as stack:
        if chosen.out is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-"))).resolve()
        else:
            folder = chosen.out.resolve()
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                parser.error(f"--out {folder}: is not empty")
        soak = Soak(folder, chosen.sites, chosen.rounds, chosen.seed, chosen.every)
        stack.callback(soak.clean_up)
        try:
            soak.prepare(chosen.max_minutes * 60.0)
        except (subprocess.SubprocessError, OSError) as error:
            print(f"the soak cannot begin: {error}", file=sys.stderr)
            return 1
        soak.execute(plan_kills(chosen.kills, chosen.rounds, kinds, chosen.seed), chosen.max_minutes * 60.0)
        result = soak.result()
        write_json(folder / "soak.json", result)
        print(tables(result), flush=True)
        return 0 if result["difference"] == 0.0 and not result["failure"] else 1


def plan_kills(count: int, rounds: int, kinds: Sequence[str], seed: int) -> list[Kill]:
    """Kills at random rounds, in their order; every kind comes once before any comes twice. The last
    tenth of the rounds has none, so that all are recovered from.
    """
    generator = random.Random(seed)
    drawn: list[str] = []
    while len(drawn) < count:
        drawn += generator.sample(list(kinds), len(kinds))
    after = sorted(generator.randint(1, max(1, rounds * 9 // 10)) for _ in range(count))
    return [Kill(kind, number) for kind, number in zip(drawn, after, strict=False)]


class Soak:
    """A federation in a folder of its own, the run over it, and what was seen of them."""

    def __init__(self, folder: Path, sites: int, rounds: int, seed: int, every: float) -> None:
        self.folder, self.sites, self.rounds, self.seed, self.every = folder, sites, rounds, seed, every
        self.federation, self.out = folder / "federation", folder / "run"
        self.temporary = Path(tempfile.mkdtemp(prefix="soak-"))  # short, for sockets' paths
        self.generator = random.Random(seed + 1)
        self.environment = {"TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"}
        self.began, self.ended = time.monotonic(), threading.Event()
        self.samples, self.kills, self.notes = list[Sample](), list[Kill](), list[str]()
        self.round_ends: list[tuple[float, int]] = []
        self.failure, self.starts = "", 0
        self.threads: list[threading.Thread] = []
        self.run_process: SupervisedProcess | None = None

    # --- the work ---

    def prepare(self, seconds: float) -> None:
        """Write data, model and federation, and run the recipe in process, in ``seconds`` at most."""
        write_data(self.folder, 40 * self.sites)
        write_model(self.folder / "model", width=64, layers=2, vocabulary=400)
        content = {
            "model": {"base": str(self.folder / "model")},
            "data": {"source": str(self.folder), "max_length": 16},
            "clients": {"partition": "iid", "count": self.sites},
            "method": {"name": "lora"},
            "compression": {"kind": "int8", "error_feedback": True},  # so that sites have a memory
            "training": {"batch_size": 8, "local_steps": 1, "cohort_width": 1},
            "rounds": {"count": self.rounds, "min_clients": self.sites},
            "evaluation": {"every": 10, "batch_size": 1, "select": "last", "untuned": False},
            "seed": self.seed,
        }
        recipe = load_recipe(content)
        write_text(self.folder / "recipe.toml", to_toml(recipe))
        self.note("the run in process")
        with (self.folder / "expected.log").open("wb") as log:
            subprocess.run(
                [*self.command("run"), "--out", str(self.folder / "expected")],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True, timeout=seconds,
                env=os.environ | self.environment,
            )  # fmt: skip
        self.note(f"a federation of {self.sites} sites")
        prepare(resolved(recipe), self.federation, free_port())
        changes = {"round_seconds": TIMEOUT, "grace_seconds": TIMEOUT, "quorum_seconds": TIMEOUT}
        save_federation(self.federation, load_federation(self.federation).model_copy(update=changes))

    def execute(self, kills: Sequence[Kill], seconds: float) -> None:
        """Run the federation to its end, and kill processes meanwhile."""
        self.began = time.monotonic()
        for work in (self.supervise_sites, self.watch, lambda: self.kill_all(kills)):
            thread = threading.Thread(target=self.guarded, args=(work,), daemon=True)
            thread.start()
            self.threads.append(thread)
        failed, reached = 0, 0
        while not self.failure:
            code = self.run_once(self.began + seconds)
            if code == 0:
                break
            if code is None:
                self.failure = self.failure or f"not finished after {seconds / 60:.0f} minutes"
            elif code > 0:  # an error of its own; a negative code is a signal
                failed = failed + 1 if self.done() <= reached else 1
                self.note(f"the run ended with code {code}; run.log has the reason")
                if failed >= MAX_FAILED_RUNS:
                    self.failure = f"the run failed {failed} times without a new round"
            reached = self.done()
        self.finish()

    def run_once(self, deadline: float) -> int | None:
        """Start the run, resumed if it began earlier; its exit code, or None at the ``deadline``."""
        resume = ["--resume"] if (self.out / "recipe.toml").exists() else []
        command = [
            *self.command("deploy", "run"),
            "-f",
            str(self.federation),
            "--out",
            str(self.out),
            *resume,
        ]
        self.run_process = SupervisedProcess(command, self.folder / "run.log", self.environment)
        self.run_process.start()
        self.starts += 1
        process = self.run_process.process
        assert process is not None
        while time.monotonic() < deadline and not self.failure:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=0.5)
        self.run_process.stop()
        return None

    def supervise_sites(self) -> None:
        """Run every site as ``fedcustom site start`` does, and start it again when it dies."""
        processes = []
        for kit in sorted((self.federation / "sites").iterdir()):
            command = [sys.executable, "-m", "fedcustom", "site", "start", str(kit), "--data"]
            command.append(str(kit / "data" / "site.toml"))
            processes.append(SupervisedProcess(command, self.folder / f"{kit.name}.log", self.environment))
        if not keep_alive(processes, self.note, self.ended.is_set):
            raise RuntimeError("a site does not start")

    def kill_all(self, kills: Sequence[Kill]) -> None:
        """Kill one process after the other, each once a round has ended after the previous one."""
        for kill in kills:
            while self.done() < kill.round and not self.ended.wait(0.05):
                pass
            self.ended.wait(self.generator.uniform(0.0, 1.0))
            if self.ended.is_set():
                break
            self.kills.append(kill)
            self.kill_one(kill)
            until = time.monotonic() + RECOVERY_TIMEOUT
            while not kill.skipped and time.monotonic() < until and not self.ended.wait(0.05):
                if (end := self.first_end_after(kill.at)) is not None:
                    kill.seconds = end - kill.at
                    break
        for kill in kills[len(self.kills) :]:
            kill.skipped = "the run had ended"
            self.kills.append(kill)

    def kill_one(self, kill: Kill) -> None:
        """Kill one process of a kind, chosen at random."""
        until = time.monotonic() + 30.0
        while time.monotonic() < until and not self.ended.is_set():
            if found := self.processes()[kill.kind]:
                kill.process, kill.at = self.generator.choice(sorted(found)), time.monotonic()
                with contextlib.suppress(ProcessLookupError):
                    os.kill(kill.process, signal.SIGKILL)
                self.note(f"killed: {kill.kind} ({kill.process}) after round {self.done()}")
                return
            time.sleep(0.2)
        kill.skipped = "no such process"

    # --- observation ---

    def watch(self) -> None:
        """Note the ends of rounds, and sample the processes."""
        sampled = measured = 0.0
        while not self.ended.wait(0.1):
            now, done = time.monotonic(), self.done()
            if not self.round_ends or self.round_ends[-1][1] != done:
                self.round_ends.append((now, done))
            if now - sampled < self.every:
                continue
            sampled, sample = now, Sample(now - self.began, done)
            for kind, pids in self.processes().items():
                facts = [found for pid in pids if (found := facts_of(pid))]
                if facts:
                    sample.kinds[kind] = {key: max(each[key] for each in facts) for key in facts[0]}
                    sample.kinds[kind]["processes"] = len(facts)
            if now - measured > 5 * self.every:
                measured, sample.disk = now, self.disk()
            self.samples.append(sample)

    def disk(self) -> dict[str, float]:
        """Megabytes in the folders, the largest file that grows by lines, and entries in the temporary
        folder.
        """
        kits = sorted((self.federation / "sites").iterdir())
        logs = [path for path in files_in(self.federation) if LOG.fullmatch(path.name)]
        return {
            "server MB": size(self.federation / "server") / 1e6,
            "largest site MB": max(size(kit) for kit in kits) / 1e6,
            "largest log MB": max((size(log) for log in logs), default=0) / 1e6,
            "run MB": size(self.out) / 1e6,
            "temporary MB": size(self.temporary) / 1e6,
            "temporary entries": float(len(list(self.temporary.iterdir()))),
            "files half-written": float(
                sum(1 for path in files_in(self.folder) if TEMPORARY.fullmatch(path.name))
            ),
        }

    def done(self) -> int:
        """Rounds that have ended."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            lines = (self.out / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
            return int(json.loads(lines[-1])["round"])
        return 0

    def first_end_after(self, moment: float) -> float | None:
        """When a round ended next; one is skipped, which may have been under way."""
        ends = [at for at, _ in self.round_ends if at > moment]
        return ends[1] if len(ends) > 1 else None

    def processes(self) -> dict[str, list[int]]:
        """The federation's processes by kind."""
        found: dict[str, list[int]] = {kind: [] for kind in KINDS}
        for pid, line in command_lines():
            for kind, words in KINDS.items():
                if all(word.format(federation=self.federation) in line for word in words):
                    found[kind].append(pid)
        return found

    # --- the end ---

    def finish(self) -> None:
        """End what watches and supervises."""
        self.ended.set()
        for thread in self.threads:
            thread.join(timeout=60.0)

    def clean_up(self) -> None:
        """End every process, and remove the temporary folder."""
        self.finish()
        if self.run_process is not None:
            self.run_process.stop()
        until = time.monotonic() + 20.0
        while (left := [pid for pid, line in command_lines() if str(self.federation) in line]) and (
            time.monotonic() < until
        ):
            for pid in left:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.2)
        shutil.rmtree(self.temporary, ignore_errors=True)

    def result(self) -> dict[str, Any]:
        """Everything that was seen, and the difference from the run in process."""
        difference, compared = None, ""
        try:
            difference, compared = compare(self.folder / "expected", self.out)
        except Exception as error:
            self.failure = self.failure or f"the tensors cannot be compared: {error}"
        if self.done() < self.rounds:
            self.failure = self.failure or f"{self.done()} of {self.rounds} rounds"
        return {
            "sites": self.sites, "rounds": self.rounds, "seed": self.seed,
            "machine": environment.describe()["processor"], "cores": os.cpu_count(),
            "seconds": round(time.monotonic() - self.began, 1), "starts of the run": self.starts,
            "rounds reached": self.done(), "failure": self.failure,
            "difference": difference, "compared": compared,
            "kills": [asdict(kill) | {"at": round(kill.at - self.began, 1)} for kill in self.kills],
            "left in the temporary folder": sorted(path.name for path in self.temporary.iterdir()),
            "notes": self.notes,
            "samples": [asdict(sample) for sample in self.samples],
        }  # fmt: skip

    # --- parts ---

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "fedcustom", *words, str(self.folder / "recipe.toml")]

    def note(self, text: str) -> None:
        self.notes.append(f"{time.monotonic() - self.began:.1f} s: {text}")
        print(self.notes[-1], flush=True)

    def guarded(self, work: Callable[[], None]) -> None:
        """Run a thread's work; an error ends the soak, and is its failure."""
        try:
            work()
        except Exception as error:
            self.failure = self.failure or f"{type(error).__name__}: {error}"


def compare(expected: Path, out: Path) -> tuple[float, str]:
    """Largest difference between the last checkpoints of two runs, and what was compared."""
    first, second = (Checkpoints(path / "checkpoints") for path in (expected, out))
    if first.rounds()[-1] != second.rounds()[-1]:
        raise ValueError(f"last checkpoints are of rounds {first.rounds()[-1]} and {second.rounds()[-1]}")
    mine = first.load(first.rounds()[-1]).state.tensors
    other = second.load(second.rounds()[-1]).state.tensors
    if mine.keys() != other.keys() or not mine:
        raise ValueError("the names of the tensors differ")
    numbers = sum(tensor.numel() for tensor in mine.values())
    largest = max(float((mine[name] - other[name]).abs().max()) for name in mine)
    return largest, f"{numbers} numbers in {len(mine)} tensors"


def command_lines() -> Iterator[tuple[int, str]]:
    """Processes of this machine, without this one."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if line:
                    yield int(folder.name), line


def facts_of(pid: int) -> dict[str, float] | None:
    """Resident memory in MB, threads and open descriptors of a process; None if it has gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        memory, threads = (int(status.split(key)[1].split()[0]) for key in ("VmRSS:", "Threads:"))
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    except (OSError, IndexError):
        return None
    return {"MB": memory / 1024, "threads": threads, "descriptors": descriptors}


def files_in(folder: Path) -> Iterator[Path]:
    """All files in a folder and those below. Unlike ``Path.glob`` it does not fail where one disappears."""
    for parent, _, names in os.walk(folder):
        yield from (Path(parent) / name for name in names)


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; what disappears meanwhile does not count."""
    total = 0
    for file in files_in(path) if path.is_dir() else [path]:
        with contextlib.suppress(OSError):
            if file.is_file() and not file.is_symlink():
                total += file.stat().st_size
    return total


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- tables ---


def tables(result: Mapping[str, Any]) -> str:
    """The result as Markdown: totals, kills by kind, and each figure in the first and the last third."""
    head = (
        f"{result['sites']} sites, {result['rounds reached']} of {result['rounds']} rounds in "
        f"{result['seconds']} s, {result['starts of the run']} starts of the run; difference "
        f"{result['difference']} ({result['compared']})"
    )
    if result["failure"]:
        head += f"; FAILED: {result['failure']}"
    lines = [head, "", "| killed | times | skipped | seconds to the next round but one, median | largest |"]
    lines.append("|---|---|---|---|---|")
    for kind in KINDS:
        of = [kill for kill in result["kills"] if kill["kind"] == kind]
        seconds = [kill["seconds"] for kill in of if kill["seconds"] is not None]
        skipped = sum(bool(kill["skipped"]) for kill in of)
        figures = f"{statistics.median(seconds):.1f} | {max(seconds):.1f}" if seconds else "- | -"
        lines.append(f"| {kind} | {len(of) - skipped} | {skipped} | {figures} |")
    lines += ["", "| process | figure | first third, median | last third, median | largest |"]
    lines.append("|---|---|---|---|---|")
    for kind in KINDS:
        for key in ("MB", "threads", "descriptors"):
            values = [each["kinds"][kind][key] for each in result["samples"] if kind in each["kinds"]]
            lines += _row(kind, key, values)
    for key in next((each["disk"] for each in result["samples"] if each["disk"]), {}):
        lines += _row("disk", key, [each["disk"][key] for each in result["samples"] if each["disk"]])
    lines += ["", f"left in the temporary folder: {result['left in the temporary folder'] or 'nothing'}"]
    return "\n".join(lines)


def _row(kind: str, key: str, values: Sequence[float]) -> list[str]:
    if not values:
        return []
    third = max(1, len(values) // 3)
    first, last = statistics.median(values[:third]), statistics.median(values[-third:])
    return [f"| {kind} | {key} | {first:.4g} | {last:.4g} | {max(values):.4g} |"]


if __name__ == "__main__":
    sys.exit(main())
