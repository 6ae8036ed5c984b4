"""``make bench``: run the cases, keep their JSON, write docs/benchmarks.md."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import harness
from .cases import (
    aggregation,
    cross_device,
    cross_silo,
    gpu,
    instruct,
    peers_job,
    scaling,
    secure_sums,
    startup,
    workers,
)
from .environments import NAMES, peer
from .harness import HERE, alternate, compare, machine, own_engines
from .page import write_page

RESULTS = HERE / "results"
CASES = ("a", "b", "c", "d", "e", "f", "g", "h", "i", "j")


def main() -> None:
    """``python -m benchmarks [CASE ...]``."""
    parser = argparse.ArgumentParser(prog="benchmarks", description="Measure this project against others.")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; none: all")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions of each engine (default 5)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    parser.add_argument("--limit", type=float, default=900, help="seconds for one engine's repetition")
    parser.add_argument(
        "--trec", type=Path, default=Path(os.environ.get("TREC", "../shared/data/trec")),
        help="folder with TREC-6 as train.jsonl and test.jsonl (or TREC=... in the environment)",
    )  # fmt: skip
    parser.add_argument(
        "--dolly", type=Path, default=Path(os.environ.get("DOLLY", "../shared/data/dolly15k")),
        help="folder with Dolly 15k as train.jsonl (or DOLLY=... in the environment)",
    )  # fmt: skip
    parser.add_argument("--peers", default=",".join(NAMES), help="others to compare with; '' for none")
    parser.add_argument(
        "--peer-repeat", type=int, default=None,
        help="repetitions of each of the others, in the first of ours; default: as many, but 1 in (g)",
    )  # fmt: skip
    parser.add_argument("--page", action="store_true", help="only write docs/benchmarks.md from results/")
    options = parser.parse_args()
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"no case {sorted(unknown)[0]!r}; there are {', '.join(CASES)}")
    if unknown := set(filter(None, options.peers.split(","))) - set(NAMES):
        parser.error(f"--peers: no peer {sorted(unknown)[0]!r}; there are {', '.join(NAMES)}")
    if min(options.repeat, options.threads, 1 if options.peer_repeat is None else options.peer_repeat) < 1:
        parser.error("--repeat, --peer-repeat and --threads must be 1 or more")
    for case in [] if options.page else options.cases or CASES:
        print(f"case {case}", flush=True)
        content = {"case": case, "machine": machine(options.threads), **RUNNERS[case](options)}
        harness.write(case, content, RESULTS)
        if "skipped" in content:
            print(f"  {content['skipped']}")
    write_page(RESULTS, HERE.parent / "docs" / "benchmarks.md")


def _compared(
    job: Callable[[Path], Path], peers: list[str], options: Any, peer_repeat: int | None = None
) -> dict[str, Any]:
    """Ours against the bare loop and some peers, and our profile. Peers run ``--peer-repeat`` times, or
    ``peer_repeat`` times where that is not given.
    """
    often = options.peer_repeat or peer_repeat
    wanted = [name for name in peers if name in options.peers.split(",")]
    with tempfile.TemporaryDirectory() as space:
        folder = job(Path(space))
        engines = [*own_engines(), *(replace(peer(name), repetitions=often) for name in wanted)]
        rows = compare(alternate(engines, folder, options.repeat, options.threads, limit=options.limit))
        return {"engines": rows, "profile": _profile(folder, Path(space) / "profile.json", options.threads)}


def _profile(job: Path, out: Path, threads: int) -> dict[str, Any] | None:
    """Where our time goes; none if that cannot be measured, which must not lose the times themselves."""
    variables = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.profile", str(job), str(out)],
        cwd=HERE.parent, env={**os.environ, **variables}, check=False, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        print(f"  no profile: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
        return None
    profile: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return profile


def _a(options: Any) -> dict[str, Any]:
    found = _compared(peers_job.job, ["flower", "nvflare", "pfl"], options)
    return found if workers.missing() else {**found, "workers": _in_workers(options)}


def _in_workers(options: Any) -> dict[str, Any]:
    """Ours in as many workers as there are threads, against one process, the bare loop and Flower."""
    with tempfile.TemporaryDirectory() as space:
        plain = peers_job.job(Path(space) / "plain")
        shared = peers_job.job(Path(space) / "workers", workers=options.threads)
        ours, bare = own_engines()
        mine = replace(ours, name=f"{ours.name}, {options.threads} workers", job=shared)
        others = [peer("flower")] if "flower" in options.peers.split(",") else []
        engines = [ours, mine, bare, *others]
        measured = alternate(engines, plain, options.repeat, options.threads, limit=options.limit)
        return {"machine": machine(options.threads), "engines": compare(measured, mine.name)}


def _b(options: Any) -> dict[str, Any]:
    if not (options.trec / "train.jsonl").exists():
        return {"skipped": f"skipped: no TREC-6 in {options.trec}; name its folder with --trec or TREC=..."}
    trec = options.trec.resolve()
    found = _compared(lambda folder: cross_device.job(folder, trec), ["flower", "pfl"], options)
    return {**found, "auto": _precision_by_machine(trec, options)}


def _precision_by_machine(trec: Path, options: Any) -> dict[str, Any]:
    """Ours in the precision that ``model.dtype = "auto"`` chooses, against the bare loop in float32 and in
    that precision; and in float32.
    """
    with tempfile.TemporaryDirectory() as space:
        plain = cross_device.job(Path(space), trec)
        chosen = cross_device.job(Path(space), trec, dtype="auto")
        precision = json.loads((chosen / "work.json").read_text(encoding="utf-8"))["precision"]
        ours, bare = own_engines()
        engines = [ours, bare]
        if precision != "float32":
            engines += [replace(one, name=f"{one.name}, {precision}", job=chosen) for one in (ours, bare)]
        measured = alternate(engines, plain, options.repeat, options.threads, limit=options.limit)
        found = compare(measured, engines[-2].name)
        return {"machine": machine(options.threads), "precision": precision, "engines": found}


def _c(options: Any) -> dict[str, Any]:
    return {
        "methods": {
            method: _compared(lambda folder, m=method: cross_silo.job(folder, m), [], options)  # type: ignore[misc]
            for method in cross_silo.METHODS
        }
    }


def _d(options: Any) -> dict[str, Any]:
    return scaling.measure(threads=options.threads)


def _e(options: Any) -> dict[str, Any]:
    return {"aggregation": aggregation.measure()}


def _f(options: Any) -> dict[str, Any]:
    if reason := gpu.missing():
        return {"skipped": reason}
    with tempfile.TemporaryDirectory() as space:
        return {"gpu": gpu.measure(Path(space))}


def _g(options: Any) -> dict[str, Any]:
    if not (options.dolly / "train.jsonl").exists():
        return {
            "skipped": f"skipped: no Dolly 15k in {options.dolly}; name its folder with --dolly or DOLLY=..."
        }
    dolly = options.dolly.resolve()
    return {
        "steps": instruct.STEPS,
        "methods": {
            method: _compared(
                lambda folder, m=method: instruct.job(folder, m, dolly),  # type: ignore[misc]
                ["flower", "nvflare_hf"],
                options,
                peer_repeat=1,
            )
            for method in instruct.METHODS
        },
    }


def _h(options: Any) -> dict[str, Any]:
    return {"secure_sums": secure_sums.measure()}


def _i(options: Any) -> dict[str, Any]:
    return {"startup": startup.measure(options.repeat)}


def _j(options: Any) -> dict[str, Any]:
    if reason := workers.missing():
        return {"skipped": reason}
    return {"workers": workers.measure(repetitions=options.repeat, threads=max(2, options.threads))}


RUNNERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "a": _a,
    "b": _b,
    "c": _c,
    "d": _d,
    "e": _e,
    "f": _f,
    "g": _g,
    "h": _h,
    "i": _i,
    "j": _j,
}

if __name__ == "__main__":
    main()
