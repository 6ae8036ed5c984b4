"""Alternating engines on one job, and what is made of their times."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .memory import watched

HERE = Path(__file__).parent
PEERS = HERE / "peers"
OURS = "fedcustom"


@dataclass(frozen=True)
class Engine:
    """Something that does a job: ``command`` is called with the job's folder and the result's. With a ``job``
    of its own it does that one.
    """

    name: str
    command: tuple[str, ...]
    problem: str = ""
    """Why it cannot run, where that is known already."""
    job: Path | None = None
    repetitions: int | None = None
    """How often it runs at most; unset: as often as is asked for."""


@dataclass
class Measured:
    """One engine's repetitions: seconds of every round, of the rest, and from the start of its process to the
    end of its last round; bytes of peak memory until then; and what its result is like.
    """

    rounds: list[list[float]] = field(default_factory=list)
    startup: list[float] = field(default_factory=list)
    processor: list[list[float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    until_trained: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    distance: float | None = None
    development: tuple[float, float] | None = None
    """The loss on the job's development examples before training and after it."""
    problem: str = ""


def own_engines() -> list[Engine]:
    """Ours, and the bare loop in the same environment."""
    return [
        Engine(OURS, (sys.executable, "-m", "benchmarks.ours")),
        Engine("bare loop", (sys.executable, str(PEERS / "bare" / "run.py"))),
    ]


def alternate(
    engines: Sequence[Engine], job: Path, repetitions: int, threads: int, *, limit: float = 900
) -> dict[str, Measured]:
    """Run every engine once, then every engine again, and so on. One that fails is not tried again. Where the
    job has development examples, the adapters of the first repetition are evaluated on them afterwards.
    """
    measured = {engine.name: Measured(problem=engine.problem) for engine in engines}
    with tempfile.TemporaryDirectory() as space:
        for number in range(repetitions):
            for engine in engines:
                found = measured[engine.name]
                if found.problem or number >= (engine.repetitions or repetitions):
                    continue
                folder = Path(space) / f"{engine.name}-{number}".replace(" ", "-")
                folder.mkdir()
                print(f"  {engine.name}, repetition {number + 1} of {repetitions}", flush=True)
                _run(engine, job, folder, threads, found, limit)
        for engine in engines:
            mine, other = (Path(space) / f"{n}-0".replace(" ", "-") for n in (OURS, engine.name))
            if engine.name != OURS and (mine / "model").exists() and (other / "model").exists():
                measured[engine.name].distance = distance(mine / "model", other / "model", job / "start")
        folders = {name: Path(space) / f"{name}-0".replace(" ", "-") / "model" for name in measured}
        _evaluate(
            job, {name: folder for name, folder in folders.items() if folder.exists()}, measured, threads
        )
    return measured


def _evaluate(
    job: Path, adapters: Mapping[str, Path], measured: Mapping[str, Measured], threads: int
) -> None:
    """The development loss of every engine's adapter, and of the one that all start from: the same code for
    all, in a process of its own.
    """
    work = job / "work.json"
    if not adapters or "development" not in json.loads(work.read_text(encoding="utf-8")):
        return
    folders = map(str, [job, job / "start", *adapters.values()])
    done = subprocess.run(
        [sys.executable, str(PEERS / "evaluate.py"), *folders],
        env=_environment(threads), check=False, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        print(f"  no development loss: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
        return
    before, *after = json.loads(done.stdout.splitlines()[-1])
    for name, loss in zip(adapters, after, strict=True):
        measured[name].development = before, loss


def _environment(threads: int) -> dict[str, str]:
    """What every engine runs in: so many threads, no network and no GPU."""
    variables = {
        "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    return {**os.environ, **variables}


def _run(engine: Engine, job: Path, folder: Path, threads: int, found: Measured, limit: float) -> None:
    """One repetition in a process of its own."""
    clock, begun = time.time(), time.perf_counter()
    log = folder / "log.txt"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [*engine.command, str(engine.job or job), str(folder)],
            env=_environment(threads), cwd=HERE.parent, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
        with watched(process.pid) as tree:
            try:
                code = process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                found.problem = f"not done after {limit:.0f} s"
                process.kill()
                process.wait()
            except BaseException:
                tree.end(0)
                raise
            seconds = time.perf_counter() - begun
        tree.end(0 if found.problem else 10)
    if found.problem:
        return
    if code or not (folder / "result.json").exists():
        lines = [
            line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
        ]
        found.problem = lines[-1][:200] if lines else f"exit code {code}"
        return
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    found.rounds.append(result.pop("rounds"))
    found.processor.append(result.pop("processor"))
    found.losses = result.pop("losses")
    ended = result.pop("ended")
    found.until_trained.append(ended - result.pop("evaluating", 0.0) - clock)
    found.memory.append(tree.peak(ended))
    found.startup.append(seconds - sum(found.rounds[-1]))
    found.notes = result


def distance(mine: Path, other: Path, start: Path) -> float:
    """How far two adapters are from each other, relative to how far the other one moved from the start."""
    import torch
    from safetensors.torch import load_file

    one, two, origin = (load_file(folder / "adapter_model.safetensors") for folder in (mine, other, start))
    if one.keys() != two.keys():
        raise ValueError(f"adapters differ in names: {sorted(one.keys() ^ two.keys())[:3]}")

    def apart(left: Mapping[str, Any], right: Mapping[str, Any]) -> float:
        return float(torch.cat([(left[n] - right[n]).double().flatten() for n in one]).norm())

    return apart(one, two) / apart(two, origin)


def steady(rounds: Sequence[float]) -> float:
    """Mean seconds a round, without the first, in which everything is slow once."""
    kept = rounds[1:] or rounds
    return sum(kept) / len(kept)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) == 1:
        return dict.fromkeys(("median", "low", "high"), values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def compare(measured: Mapping[str, Measured], mine: str = OURS) -> dict[str, Any]:
    """For each engine: seconds a round, start-up, and the time of ``mine`` over its own, repetition by
    repetition.
    """
    ours = measured[mine]
    rows: dict[str, Any] = {}
    for name, found in measured.items():
        if found.problem or not found.rounds:
            rows[name] = {"problem": found.problem}
            continue
        pairs = zip(ours.rounds, found.rounds, strict=False)
        ratios = [steady(mine) / steady(other) for mine, other in pairs]
        losses = zip(ours.losses, found.losses, strict=False)
        rows[name] = {
            "seconds": spread([steady(rounds) for rounds in found.rounds]),
            "first_round": spread([rounds[0] for rounds in found.rounds]),
            "startup": spread(found.startup),
            "ratio": spread(ratios) if ratios else None,
            "processor_ratio": _processor_ratio(ours, found),
            "distance": found.distance,
            "loss_difference": max((abs(a - b) / abs(b) for a, b in losses), default=None),
            "until_trained": spread(found.until_trained) if found.until_trained else None,
            "memory": spread(found.memory) if found.memory else None,
            "development": _development(ours, found),
            "repetitions": len(found.rounds),
            "rounds": found.rounds,
            "notes": found.notes,
        }
    return rows


SAME_LOSS = 0.01
"""How far an engine's development loss may be above ours and count as the same quality, as a share of what
training changed.
"""


def _development(ours: Measured, other: Measured) -> dict[str, Any] | None:
    """An engine's development loss before and after, and whether that is as low as ours."""
    if ours.development is None or other.development is None:
        return None
    before, after = other.development
    wanted = ours.development[1]
    reached = after <= wanted + SAME_LOSS * abs(before - wanted)
    return {"before": before, "after": after, "reached": reached}


def _processor_ratio(ours: Measured, other: Measured) -> dict[str, float] | None:
    """Our processor time over another single process's, without the first round and the last."""
    ratios = [
        sum(mine[1:-1]) / sum(theirs[1:-1])
        for mine, theirs in zip(ours.processor, other.processor, strict=False)
        if sum(mine[1:-1]) and sum(theirs[1:-1])
    ]
    return spread(ratios) if ratios and "processes" not in other.notes else None


def machine(threads: int) -> dict[str, Any]:
    """What it ran on, and what else ran there."""
    from fedcustom.core.environment import describe

    found = describe()
    found["threads"] = threads
    found["load_at_start"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    found["measured"] = time.strftime("%Y-%m-%d")
    return found


def write(case: str, content: Mapping[str, Any], folder: Path) -> None:
    """Keep a case's results."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{case}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
