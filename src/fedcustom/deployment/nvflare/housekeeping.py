"""Bounds of what the engine writes: its logs, and the folders of its jobs."""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import re
import shutil
import time
from pathlib import Path

MAX_LOG_BYTES = 8 * 2**20
"""Bytes of a log; when it has grown beyond, its newest half is kept beside it (``<name>.1``), and it starts
anew.
"""

MAX_JOB_FOLDERS = 10
"""Folders of the engine's jobs that are kept, the newest."""

INTERVAL = 30.0
"""Seconds between two looks at the sizes of logs."""

JOB_FOLDER = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def limit_log(path: Path, max_bytes: int = MAX_LOG_BYTES) -> bool:
    """Bound a log that another process may be appending to; whether it was cut.

    The log keeps its file, because its writer has that open. Lines written during the cut may be lost.
    """
    with contextlib.suppress(OSError):
        size = path.stat().st_size
        if size <= max_bytes:
            return False
        with path.open("rb") as file:
            file.seek(size - max_bytes // 2)
            newest = file.read(max_bytes)
        path.with_name(path.name + ".1").write_bytes(newest.partition(b"\n")[2])
        with path.open("r+b") as file:
            file.truncate(0)
        return True
    return False


def limit_job_folders(kit: Path, running: str, most: int = MAX_JOB_FOLDERS) -> list[str]:
    """Remove the folders of all but the newest jobs from a kit; the names of those removed.

    The job ``running`` stays in any case. At the server a job also has an entry in ``jobs/``.
    """
    removed = []
    for parent in (kit, kit / "jobs"):
        found: list[tuple[float, Path]] = []
        with contextlib.suppress(OSError):
            for folder in parent.iterdir():
                if JOB_FOLDER.fullmatch(folder.name) and folder.name != running and not folder.is_symlink():
                    with contextlib.suppress(OSError):
                        found.append((folder.stat().st_mtime, folder))
        for _, folder in sorted(found, reverse=True)[most - 1 :]:
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder.name)
    return removed


def limit_log_handlers(max_bytes: int = MAX_LOG_BYTES) -> None:
    """Bound the files of this process' own logging, each with one older file beside it."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.handlers.RotatingFileHandler):
            handler.maxBytes, handler.backupCount = max_bytes, 1


class Housekeeping:
    """Housekeeping in the process of a job: old jobs' folders go when it starts, logs are bounded meanwhile.

    ``kit`` is the folder of the participant's kit, ``job`` the job's identifier.
    """

    def __init__(self, kit: Path, job: str) -> None:
        self.logs = [kit / "audit.log", kit / job / "audit.log"]  # the engine's, of its own commands
        self._next = 0.0
        limit_log_handlers()
        limit_job_folders(kit, job)

    def tidy(self) -> None:
        """Bound the logs, if they were not looked at lately."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + INTERVAL
            for log in self.logs:
                limit_log(log)
