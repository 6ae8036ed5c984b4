"""Bound of the engine's threads: one thread for the timers of all streams received.

The engine keeps a record of each stream that it has received for 65 seconds, to answer repeated chunks, and
removes it by a thread of its own (``threading.Timer``). Every reply to a site's query for tasks is a stream,
and a site asks up to twenty times a second: a thousand threads in a site's job.
"""

from __future__ import annotations

import heapq
import itertools
import sys
import threading
import time
from collections.abc import Callable
from typing import Any


class SharedTimers:
    """Timers that share one thread, which ends when none is left.

    The functions are called one after the other in that thread, so they must be short.
    """

    def __init__(self) -> None:
        self._due: list[tuple[float, int, SharedTimer]] = []
        self._numbers, self._changed = itertools.count(), threading.Condition()
        self._thread: threading.Thread | None = None

    def call_later(self, seconds: float, function: Callable[[], object]) -> SharedTimer:
        """Call ``function`` after so many seconds, unless the timer is cancelled before."""
        timer = SharedTimer(function)
        with self._changed:
            heapq.heappush(self._due, (time.monotonic() + seconds, next(self._numbers), timer))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="stream_timers", daemon=True)
                self._thread.start()
            self._changed.notify()
        return timer

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._due and (wait := self._due[0][0] - time.monotonic()) > 0:
                    self._changed.wait(wait)
                if not self._due:
                    self._thread = None
                    return
                timer = heapq.heappop(self._due)[2]
            timer.fire()


class SharedTimer:
    """A timer of :class:`SharedTimers`."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._function: Callable[[], object] | None = function

    def cancel(self) -> None:
        """Do not call the function any more, and let go of it."""
        self._function = None

    def fire(self) -> None:
        """Call the function. An error in it is the engine's, as in a thread of its own, and ends no other
        timer.
        """
        function, self._function = self._function, None
        if function is None:
            return
        try:
            function()
        except Exception:
            threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))


def share_stream_timers() -> bool:
    """Have this process' received streams share one thread for their timers; False, and nothing is changed,
    where the engine's version keeps its streams in another way.

    This replaces a private method of the engine (``RxTask._schedule_remove_task``, NVIDIA FLARE 2.9): it has
    no setting for it but the 65 seconds, which are the time in which a slow network may repeat a chunk.
    """
    from nvflare.fuel.f3.streaming import byte_receiver

    stream = byte_receiver.RxTask
    original = getattr(stream, "_schedule_remove_task", None)
    if getattr(original, "shared", False):
        return True
    used = {"stop_lock", "cleanup_timer", "completed_task_ttl", "_remove_task"}
    if original is None or not used <= set(original.__code__.co_names):
        return False
    timers = SharedTimers()

    def schedule(self: Any, ttl: float | None = None) -> None:
        with self.stop_lock:
            if self.cleanup_timer is None:
                seconds = self.completed_task_ttl if ttl is None else ttl
                self.cleanup_timer = timers.call_later(seconds, self._remove_task)

    schedule.shared = True  # type: ignore[attr-defined]
    stream._schedule_remove_task = schedule
    return True
