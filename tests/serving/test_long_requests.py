"""Requests with many inputs, of which each takes its time."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from fedcustom.serving.app import result
from fedcustom.serving.errors import ApiError
from fedcustom.serving.requests import ClassifyRequest
from fedcustom.serving.served import AT_ONCE, Served
from fedcustom.serving.worker import Job


class CountingRun:
    """Labels each input by itself, and cancels the job at work after a number of calls."""

    recipe = SimpleNamespace(data=SimpleNamespace(max_length=8))

    def __init__(self, calls: int) -> None:
        self.calls, self.seen = calls, list[list[str]]()
        self.job: Job | None = None

    def count_cuts(self, inputs: list[str]) -> Any:
        return SimpleNamespace(inputs=0, tokens={})

    def take_cuts(self) -> list[str]:
        return []

    def predict(self, inputs: list[str]) -> list[dict[str, Any]]:
        self.seen.append(inputs)
        if self.job is not None and len(self.seen) == self.calls:
            self.job.cancel()
        return [{"label": text} for text in inputs]


def test_a_classification_ends_soon_after_its_caller_has_left() -> None:
    texts = [str(number) for number in range(3 * AT_ONCE + 1)]
    served = object.__new__(Served)  # without a run's directory
    served.name = "run"
    loop = asyncio.new_event_loop()
    job = Job(300.0, loop, threading.Event())
    served._run = run = CountingRun(calls=2)  # type: ignore[assignment]
    said = served.classify(ClassifyRequest(input=list(texts)))(job)
    assert [row["label"] for row in said["data"]] == texts
    assert [row["index"] for row in said["data"]] == list(range(len(texts)))
    served._run = run = CountingRun(calls=2)  # type: ignore[assignment]
    run.job = job
    with pytest.raises(ApiError):
        served.classify(ClassifyRequest(input=list(texts)))(job)
    assert [len(part) for part in run.seen] == [AT_ONCE, AT_ONCE]
    loop.close()


def test_a_request_that_outlasts_the_servers_end_is_no_error_of_the_program() -> None:
    """The server cancels it: that ends as an answer, which nobody reads, and not as a traceback."""

    async def cancelled() -> tuple[int, bool]:
        job = Job(60.0, asyncio.get_running_loop(), threading.Event())
        waits: Any = SimpleNamespace(is_disconnected=asyncio.Event().wait)
        task = asyncio.create_task(result(waits, job))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(ApiError) as caught:
            await task
        return caught.value.status, job.stopped()

    assert asyncio.run(cancelled()) == (499, True)
