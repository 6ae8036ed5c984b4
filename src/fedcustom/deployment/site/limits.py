"""Limits of a task: seconds, memory, and cancellation by the site's administrator."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from ...core.errors import DeploymentError, PolicyError

CANCEL_FILE = "cancel"
"""File in the folder of a site's own files: while a task is under way it says to stop that task."""

POLL_SECONDS = 0.1

GRACE_SECONDS = 60.0
"""A task that has not stopped after this long, since one call of a library goes on, ends its process."""

STOPPED = 75
"""Exit status of a process that ended so."""


class TaskStopped(PolicyError):
    """A task took too long, or was cancelled by the site's administrator."""


class _Stop(BaseException):
    """Raised in the thread of a task. No error: what handles errors must not take it for one."""


@contextlib.contextmanager
def stoppable(seconds: float, cancel: Path, *, own_process: bool = False) -> Iterator[None]:
    """Stop the enclosed work after so many seconds, or when the file ``cancel`` appears.

    The work is stopped between two steps of the interpreter, by an exception in its thread: a call of a
    library is not interrupted. With ``own_process``, a process that is still in such a call
    :data:`GRACE_SECONDS` later is ended; its supervisor starts it again.

    Raises:
        TaskStopped: says why.
    """
    cancel.unlink(missing_ok=True)  # of a task that ended before it was cancelled
    worker, ended, lock = threading.get_ident(), threading.Event(), threading.Lock()
    reasons: list[str] = []

    def watch() -> None:
        deadline = time.monotonic() + seconds
        while not ended.wait(min(POLL_SECONDS, max(0.0, deadline - time.monotonic()))):
            if cancel.exists():
                reason = "the task was cancelled by this site's administrator"
                cancel.unlink(missing_ok=True)
            elif time.monotonic() >= deadline:
                reason = f"policy.max_task_seconds = {seconds:g}: the task took longer and was stopped"
            else:
                continue
            with lock:
                if ended.is_set():
                    return
                reasons.append(reason)
                _raise_in(worker, _Stop)
            if not ended.wait(GRACE_SECONDS) and own_process:
                os._exit(STOPPED)
            return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        try:
            yield
        finally:
            with lock:
                ended.set()
            if reasons:
                time.sleep(0.05)  # an exception that is on its way arrives here
    except _Stop:
        pass
    finally:
        _raise_in(worker, None)
        watcher.join(1.0)
    if reasons:
        raise TaskStopped(reasons[0])


def _raise_in(thread: int, kind: type[BaseException] | None) -> None:
    """Raise an exception in a thread at its next step; None: take back one that has not been raised yet."""
    raised = None if kind is None else ctypes.py_object(kind)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)


def limit_memory(gigabytes: float | None) -> None:
    """Limit the memory that this process may allocate, for good; None: not at all.

    An allocation beyond it fails, and with it the task. Linux counts all private writable memory, not files
    that are mapped (a base model's weights) and not a GPU's memory. macOS and Windows enforce no such limit.

    Raises:
        DeploymentError: a limit is set on another platform than Linux.
    """
    check_platform(gigabytes)
    if gigabytes is None:
        return
    import resource

    most = int(gigabytes * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def check_platform(gigabytes: float | None) -> None:
    """Refuse a limit of memory on a platform that does not enforce it.

    Raises:
        DeploymentError: a limit is set on another platform than Linux.
    """
    if gigabytes is not None and not sys.platform.startswith("linux"):
        raise DeploymentError(
            f"policy.max_memory_gigabytes = {gigabytes:g}: cannot be enforced on {sys.platform}, only on "
            "Linux; remove the line, or limit the service that runs the site"
        )
