"""Runs many recipes, several at a time where there are cores; each in a process of its own."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from ..driver import run_recipe
from ..errors import FedcustomError
from ..files import write_text
from ..recipe import Recipe, to_toml

WEIGHTS = ("model", "checkpoints")
"""What of a finished run's directory holds weights."""


@dataclass(frozen=True)
class Job:
    """One run: its name, its recipe and its directory."""

    name: str
    recipe: Recipe
    directory: Path


Done = Callable[[Job, str | None], None]
"""Told of each job that is done, with the reason where it failed."""


def run_jobs(jobs: Sequence[Job], at_once: int, done: Done) -> None:
    """Run all jobs; those that were begun go on where they stopped. One that fails does not hold up the
    others. ``done`` is called in this thread, in the order in which jobs end.

    With one at once they run in this process; with more, each in a process with one thread. On
    KeyboardInterrupt the processes are stopped; what they have done is kept.
    """
    if at_once == 1:
        for job in jobs:
            done(job, _here(job))
            gc.collect()
        return
    processes: set[subprocess.Popen[str]] = set()
    waiting, pending = list(jobs), dict[Future[str | None], Job]()
    # On the way out the processes are stopped first, and then the threads that wait for them end.
    with ThreadPoolExecutor(at_once) as pool, _stopped(processes):
        while waiting or pending:
            while waiting and len(pending) < at_once:
                job = waiting.pop(0)
                pending[pool.submit(_apart, job, processes)] = job
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                done(pending.pop(future), future.result())


def drop_weights(directory: Path) -> None:
    """Remove a finished run's model and checkpoints; its figures stay."""
    for name in WEIGHTS:
        shutil.rmtree(directory / name, ignore_errors=True)


def _here(job: Job) -> str | None:
    try:
        run_recipe(job.recipe, job.directory, resume=True)
    except FedcustomError as error:
        return str(error)
    return None


def _apart(job: Job, processes: set[subprocess.Popen[str]]) -> str | None:
    """The job by the command line, with one thread; the reason where it failed."""
    recipe = job.directory.parent / f"{job.directory.name}.toml"
    write_text(recipe, to_toml(job.recipe))
    command = [sys.executable, "-m", "fedcustom", "run", str(recipe), "--out", str(job.directory)]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        [*command, "--resume", "--quiet"],
        env={**os.environ, **threads},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    processes.add(process)
    _, said = process.communicate()
    processes.discard(process)
    recipe.unlink(missing_ok=True)
    if process.returncode == 0:
        return None
    lines = [line for line in said.strip().splitlines() if line.strip()]
    last = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")
    return last.removeprefix("error: ") or f"ended with {process.returncode}"


@contextlib.contextmanager
def _stopped(processes: set[subprocess.Popen[str]]) -> Iterator[None]:
    """Leaves no process behind, however it is left."""
    try:
        yield
    finally:
        for process in list(processes):
            with contextlib.suppress(ProcessLookupError):
                process.terminate()  # a background job may ignore SIGINT
