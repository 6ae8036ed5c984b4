"""Supervision of child processes: one that dies is started again."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .housekeeping import limit_log

MIN_LIFETIME = 10.0
"""Seconds: a process that dies sooner counts as a failed start."""

MAX_FAILED_STARTS = 5
"""Failed starts in a row after which a process is not started again."""


@dataclass
class SupervisedProcess:
    """A child process that is started again when it dies; its output goes to ``log``, whose size is bounded
    (:func:`~.housekeeping.limit_log`) while it is supervised. What it writes, only its owner can read.
    """

    command: list[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    failed_starts: int = 0

    def start(self) -> None:
        """Start the process; it ends with this one, whatever ends this one (on Linux)."""
        self.log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.log.touch(mode=0o600)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | dict(self.environment),
                start_new_session=True,
                umask=0o077,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        self.started = time.monotonic()

    def restart_if_dead(self) -> str:
        """Start the process again if it has died; returns what happened, or an empty text."""
        if self.process is None:
            self.start()
            return ""
        code = self.process.poll()
        if code is None:
            return ""
        lifetime = time.monotonic() - self.started
        self.failed_starts = self.failed_starts + 1 if lifetime < MIN_LIFETIME else 0
        if self.failed_starts < MAX_FAILED_STARTS:
            time.sleep(min(0.5 * 2**self.failed_starts, 8.0) if self.failed_starts else 0.0)
            self.start()
        return f"{Path(self.log).stem} ended with status {code} after {lifetime:.0f} s"

    @property
    def given_up(self) -> bool:
        """Whether the start failed too often for another try."""
        return self.failed_starts >= MAX_FAILED_STARTS

    def stop(self, timeout: float = 5.0) -> None:
        """End the process and its children: by SIGTERM and, after ``timeout`` seconds, by SIGKILL."""
        process, self.process = self.process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout)


def keep_alive(
    processes: list[SupervisedProcess], note: Callable[[str], None], stopped: Callable[[], bool]
) -> bool:
    """Supervise processes and bound their logs until ``stopped()``, then end them; False if one failed to
    start too often.
    """
    try:
        while not stopped():
            for process in processes:
                limit_log(process.log)
                if event := process.restart_if_dead():
                    note(event + ("; given up" if process.given_up else "; started again"))
                if process.given_up:
                    return False
            time.sleep(0.3)
        return True
    finally:
        for process in processes:
            process.stop()


def _end_with_parent() -> None:
    """Ask the kernel to end this process when its parent dies."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
