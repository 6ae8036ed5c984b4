"""Peak memory of a process and everything that it starts."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

PAUSE = 0.1
"""Seconds between two readings."""
SEARCH = 1.0
"""Seconds between two searches for new processes, which cost more."""


class ProcessTree:
    """A process and its descendants. One that was seen once is kept when its parent ends, which a search
    alone would lose.
    """

    def __init__(self, pid: int) -> None:
        self.root = psutil.Process(pid)
        self.known = {self.root}
        self.peaks: list[tuple[float, int]] = []
        """Each time more was held than ever before: when, in seconds since 1970, and how many bytes."""

    def search(self) -> None:
        """Find processes that were started since."""
        parents = {process.pid: process.info["ppid"] for process in psutil.process_iter(["ppid"])}
        found = {process.pid for process in self.known if process.is_running()}
        size = 0
        while size < len(found):
            size = len(found)
            found |= {pid for pid, parent in parents.items() if parent in found}
        for pid in found - {process.pid for process in self.known}:
            with contextlib.suppress(psutil.Error):
                self.known.add(psutil.Process(pid))

    def held(self) -> int:
        """Bytes of main memory that all of them hold now. What processes map together, libraries and files,
        is counted once, as much as the process has that maps most.
        """
        own, shared = 0, 0
        for process in list(self.known):
            try:
                found = process.memory_info()
            except psutil.Error:
                continue
            mapped = getattr(found, "shared", 0)
            own, shared = own + found.rss - mapped, max(shared, mapped)
        return own + shared

    def watch(self, done: threading.Event) -> None:
        """Read again and again until ``done``."""
        searched = -SEARCH
        while not done.is_set():
            if time.monotonic() - searched >= SEARCH:
                self.search()
                searched = time.monotonic()
            held = self.held()
            if held > self.peak():
                self.peaks.append((time.time(), held))
            done.wait(PAUSE)

    def peak(self, until: float = math.inf) -> int:
        """Most bytes that were held, of all readings until then (seconds since 1970)."""
        return max((held for when, held in self.peaks if when <= until), default=0)

    def end(self, patience: float = 10) -> None:
        """Wait for what the process has left behind, and end what is still there after ``patience`` seconds:
        it would disturb the next measurement.
        """
        self.search()
        _, alive = psutil.wait_procs(self.known, timeout=patience)
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()


@contextmanager
def watched(pid: int) -> Iterator[ProcessTree]:
    """A process whose memory is read meanwhile, in a thread."""
    tree, done = ProcessTree(pid), threading.Event()
    thread = threading.Thread(target=tree.watch, args=(done,), daemon=True)
    thread.start()
    try:
        yield tree
    finally:
        done.set()
        thread.join()
