"""Runs many recipes, several at a time where there are cores; each in a process of its own."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import FedcustomError
from ..core.files import write_text
from ..federated.callbacks import Callback
from ..federated.run import run_recipe
from ..federated.tracking.group import Group
from ..recipe.paths import absolute
from ..recipe.recipe import Recipe, to_toml

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

Tell = Callable[[Job, str], None]
"""Told of each line that a job of another process shows of its progress."""


def tracked(recipe: Recipe, group: Group, name: str) -> Recipe:
    """The recipe of a run whose trackers, if it has any, know it by this name in its group."""
    return recipe.model_copy(update={"tracking": group.named(recipe.tracking, name)})


def run_jobs(
    jobs: Sequence[Job],
    at_once: int,
    done: Done,
    *,
    progress_for: Callable[[Job], Callback] | None = None,
    tell: Tell | None = None,
    threads: int = 1,
) -> None:
    """Run all jobs; those that are finished are not run again, those that were begun go on where they
    stopped. One that fails does not hold up the others.

    With one at once they run in this process; with more, each in a process of its own. On KeyboardInterrupt
    the processes are stopped; what they have done is kept.

    Args:
        jobs: What to run, in this order.
        at_once: How many at the same time.
        done: Called in this thread, in the order in which jobs end.
        progress_for: Makes what is told of a job's progress, for jobs in this process.
        tell: Told of the progress of jobs in other processes, and called in other threads.
        threads: Threads of each process.
    """
    if at_once == 1:
        for job in jobs:
            done(job, _here(job, None if progress_for is None else progress_for(job)))
            gc.collect()
        return
    processes: set[subprocess.Popen[str]] = set()
    waiting, pending = list(jobs), dict[Future[str | None], Job]()
    # On the way out the processes are stopped first, and then the threads that wait for them end.
    with ThreadPoolExecutor(at_once) as pool, _stopped(processes):
        while waiting or pending:
            while waiting and len(pending) < at_once:
                job = waiting.pop(0)
                pending[pool.submit(_apart, job, processes, tell, threads)] = job
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                done(pending.pop(future), future.result())


def drop_weights(directory: Path) -> None:
    """Remove a finished run's model and checkpoints; its figures stay."""
    for name in WEIGHTS:
        shutil.rmtree(directory / name, ignore_errors=True)


def _here(job: Job, callback: Callback | None) -> str | None:
    """The job in this process; the reason where it failed. What a fault of the program raises does not hold
    up the other jobs either; its traceback is written beside the job's directory.
    """
    trace = job.directory.with_name(f"{job.directory.name}.error.txt")
    try:
        run_recipe(job.recipe, job.directory, resume=True, callbacks=[callback] if callback else [])
    except FedcustomError as error:
        return str(error)
    except Exception as error:
        write_text(trace, traceback.format_exc())
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]} (traceback: {trace})"
    trace.unlink(missing_ok=True)
    return None


def _apart(job: Job, processes: set[subprocess.Popen[str]], tell: Tell | None, threads: int) -> str | None:
    """The job by the command line; the reason where it failed."""
    recipe = job.directory.parent / f"{job.directory.name}.toml"
    write_text(recipe, to_toml(absolute(job.recipe)))  # paths are from here, and the file is not
    command = [sys.executable, "-m", "fedcustom", "run", str(recipe), "--out", str(job.directory)]
    limits = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    process = subprocess.Popen(
        [*command, "--resume", *(["--quiet"] if tell is None else [])],
        env={**os.environ, **limits, "TOKENIZERS_PARALLELISM": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    processes.add(process)
    assert process.stderr is not None
    lines: deque[str] = deque(maxlen=50)
    for line in process.stderr:
        if line.strip():
            lines.append(line.strip())
            if tell is not None and " " in line and not line.startswith("error: "):
                tell(job, line.strip())
    process.wait()
    processes.discard(process)
    recipe.unlink(missing_ok=True)
    if process.returncode == 0:
        return None
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
