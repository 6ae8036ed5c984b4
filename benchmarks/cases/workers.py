"""(j) Workers: the peers' job in one process, with one thread and with all, and in workers of one thread."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedcustom.federated.run import run_recipe
from fedcustom.recipe.recipe import load_recipe

from ..harness import HERE, spread
from ..ours import Stopwatch
from . import peers_job


def missing() -> str | None:
    """Why the case cannot be measured here."""
    if find_spec("ray") is None:
        return "skipped: needs Ray: pip install 'fedcustom[ray]'"
    return None


def measure(*, repetitions: int, threads: int) -> dict[str, Any]:
    """Seconds a round, processor time a round of all processes together, and seconds of everything else, by
    number of workers and threads; the ways take turns.
    """
    ways = {
        "one process, 1 thread": (0, 1),
        f"one process, {threads} threads": (0, threads),
        f"{threads} workers, 1 thread each": (threads, 1),
    }
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as space:
        folder = peers_job.job(Path(space))
        for number in range(repetitions):
            for way, (workers, each) in ways.items():
                print(f"  {number + 1} of {repetitions}: {way}", flush=True)
                found[way].append(_one(folder, Path(space) / f"{number}-{workers}-{each}", workers, each))
    return {way: _summary(runs) for way, runs in found.items()}


def _one(job: Path, folder: Path, workers: int, threads: int) -> dict[str, Any]:
    folder.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"HF_HUB_OFFLINE": "1", "FEDCUSTOM_EXPORT_CHECK": "off"}
    subprocess.run(
        [sys.executable, "-m", "benchmarks.cases.workers", str(job), str(folder), str(workers)],
        cwd=HERE.parent, env=environment, check=True, capture_output=True,
    )  # fmt: skip
    told: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return told


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and quartiles over the rounds after the first of all repetitions."""
    return {
        "seconds": spread([second for run in runs for second in run["rounds"][1:]]),
        "processor": spread([second for run in runs for second in run["processor"][1:-1]]),
        "first_round": spread([run["rounds"][0] for run in runs]),
        "rest": spread([run["total"] - sum(run["rounds"]) for run in runs]),
        "loss": runs[-1]["losses"][-1],
    }


class AllProcesses(Stopwatch):
    """A stopwatch whose processor time is that of this process and all that descend from it."""

    def on_run_start(self, recipe: Any, done: int, directory: Path) -> None:
        """The first round begins."""
        super().on_run_start(recipe, done, directory)
        self.last_processor = processor_seconds(os.getpid())

    def on_round_end(self, row: Mapping[str, Any]) -> None:
        """A round ended."""
        before = self.last_processor
        super().on_round_end(row)
        self.last_processor = processor_seconds(os.getpid())
        self.processor[-1] = self.last_processor - before


def processor_seconds(pid: int) -> float:
    """The processor time of a process and of those that descend from it and still run (Linux)."""
    parents, used = dict[int, int](), dict[int, float]()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "stat").read_text(encoding="ascii", errors="replace")
        except OSError:  # it has ended
            continue
        values = text.rpartition(")")[2].split()
        parents[int(folder.name)] = int(values[1])
        used[int(folder.name)] = (int(values[11]) + int(values[12])) / os.sysconf("SC_CLK_TCK")
    family = [pid]
    for one in family:
        family += [child for child, parent in parents.items() if parent == one]
    return sum(used.get(one, 0.0) for one in family)


def main() -> None:
    """``workers.py JOB RESULT WORKERS``: one run, with so many workers of one thread, or 0 for none."""
    job, folder, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    more = {"workers.count": count, "workers.cpus": 1, "workers.threads": 1} if count else {}
    watch, begun = AllProcesses(), time.perf_counter()
    run_recipe(load_recipe(job / "recipe.toml", more), folder / "run", callbacks=[watch])
    content: dict[str, Any] = {"rounds": watch.seconds, "processor": watch.processor}
    content["losses"] = watch.losses
    content["total"] = time.perf_counter() - begun
    (folder / "result.json").write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    main()
