"""The one thread that uses the model, and the queue of jobs before it."""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import FedcustomError
from .errors import ApiError, internal, shutting_down, timed_out, too_busy


@dataclass(frozen=True)
class Accepted:
    """The input is in order, and the model begins to write."""


@dataclass(frozen=True)
class Piece:
    """A piece of the text."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The end of a job, with what came of it."""

    result: Any


Event = Accepted | Piece | Finished | ApiError
"""What a job tells of itself; the last is :class:`Finished` or an error."""


@dataclass
class Job:
    """Work for the model. Its events come in the loop that asked for it.

    Attributes:
        seconds: how long it may take, with the time that it waits.
        events: what it has told.
    """

    seconds: float
    loop: asyncio.AbstractEventLoop
    closing: threading.Event
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    _cancelled: threading.Event = field(default_factory=threading.Event)
    _begun: float = field(default_factory=time.monotonic)

    def tell(self, event: Event) -> None:
        """Tell of an event, from the model's thread; nobody hears it after the loop's end."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    def cancel(self) -> None:
        """Give up: nobody waits for the answer any more."""
        self._cancelled.set()

    def stopped(self) -> bool:
        """Whether to go on no longer."""
        return self._cancelled.is_set() or self.closing.is_set() or self._late()

    def reason(self) -> ApiError:
        """Why it was stopped."""
        return shutting_down() if self.closing.is_set() else timed_out(self.seconds)

    def _late(self) -> bool:
        return time.monotonic() - self._begun > self.seconds


class Worker:
    """Does jobs one after the other, in the order in which they come.

    Args:
        waiting: how many jobs may wait for the one at work.
        seconds: how long a job may take, with the time that it waits.
        log: is told the traceback of an error in this program.
    """

    def __init__(self, waiting: int, seconds: float, log: Callable[[str], None]) -> None:
        self._places, self._seconds, self._log = waiting + 1, seconds, log
        self._waiting, self._open = waiting, 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")

    def submit(self, work: Callable[[Job], Any]) -> Job:
        """Let the model's thread do some work, whose result ends the job.

        Raises:
            ApiError: too many jobs are waiting, or the server is being stopped.
        """
        job = Job(self._seconds, asyncio.get_running_loop(), self._closing)
        with self._lock:
            if self._closing.is_set():
                raise shutting_down()
            if self._open >= self._places:
                raise too_busy(self._waiting)
            self._open += 1
        self._thread.submit(self._do, job, work)
        return job

    def stop(self) -> None:
        """Let the job at work end after its next token, and all others at once."""
        self._closing.set()

    def close(self) -> None:
        """Stop, and wait for the model's thread."""
        self.stop()
        self._thread.shutdown(wait=True)

    def _do(self, job: Job, work: Callable[[Job], Any]) -> None:
        try:
            job.tell(self._outcome(job, work))
        finally:
            with self._lock:
                self._open -= 1

    def _outcome(self, job: Job, work: Callable[[Job], Any]) -> Event:
        if job.stopped():
            return job.reason()
        try:
            result = work(job)
        except ApiError as error:
            return error
        except FedcustomError as error:
            return ApiError(str(error))
        except Exception:
            self._log(traceback.format_exc())
            return internal()
        return job.reason() if job.stopped() else Finished(result)
