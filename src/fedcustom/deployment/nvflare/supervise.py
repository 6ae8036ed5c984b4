"""Processes that are kept alive: what dies is started again."""

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

QUICK = 10.0
"""Seconds of life below which a process died of its start."""

MOST_QUICK = 5
"""Deaths of their start in a row after which a process is given up."""


@dataclass
class SupervisedProcess:
    """A command to be kept alive; its output goes to ``log``."""

    command: list[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    quick_deaths: int = 0

    def start(self) -> None:
        """Start the process; it ends with this one, whatever ends this one (on Linux)."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | dict(self.environment),
                start_new_session=True,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        self.started = time.monotonic()

    def look(self) -> str:
        """Start the process again if it has died; what happened, if anything did."""
        if self.process is None:
            self.start()
            return ""
        code = self.process.poll()
        if code is None:
            return ""
        lived = time.monotonic() - self.started
        self.quick_deaths = self.quick_deaths + 1 if lived < QUICK else 0
        if self.quick_deaths < MOST_QUICK:
            time.sleep(min(0.5 * 2**self.quick_deaths, 8.0) if self.quick_deaths else 0.0)
            self.start()
        return f"{Path(self.log).stem} ended with status {code} after {lived:.0f} s"

    @property
    def given_up(self) -> bool:
        """Whether the process died of its start too often."""
        return self.quick_deaths >= MOST_QUICK

    def stop(self, patience: float = 5.0) -> None:
        """End the process and what it started."""
        process, self.process = self.process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def keep_alive(kept: list[SupervisedProcess], note: Callable[[str], None], until: Callable[[], bool]) -> bool:
    """Keep processes alive until ``until`` says so; whether none had to be given up."""
    try:
        while not until():
            for one in kept:
                if said := one.look():
                    note(said + ("; given up" if one.given_up else "; started again"))
                if one.given_up:
                    return False
            time.sleep(0.3)
        return True
    finally:
        for one in kept:
            one.stop()


def _end_with_parent() -> None:
    """Ask the kernel to end this process when its parent dies."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
