"""A server of a run in a thread, and OpenAI's client for it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from fedcustom.serving.app import Limits, make_app
from fedcustom.serving.served import Served
from fedcustom.serving.worker import Worker

USUAL = Limits()


class Server:
    """A server on a free port of this machine."""

    def __init__(self, url: str, served: Served, log: list[str]) -> None:
        self.url, self.served, self.log = url, served, log
        self.http = httpx.Client(base_url=url, timeout=60)

    def client(self, **options: Any) -> openai.OpenAI:
        """OpenAI's client, which does not try again."""
        given = {"api_key": "none", "max_retries": 0, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **given)


@contextlib.contextmanager
def serving(directory: Path, limits: Limits, **options: Any) -> Iterator[Server]:
    """A server of a run, until the context's end."""
    log = list[str]()
    served = Served(directory)
    worker = Worker(limits.waiting, limits.seconds, log.append)
    config = uvicorn.Config(make_app(served, worker, limits, **options), port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 60
    while not server.started and time.monotonic() < end:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Server(f"http://127.0.0.1:{port}", served, log)
    finally:
        worker.stop()
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def serve() -> Iterator[Callable[..., Server]]:
    """Starts servers that end with the tests."""
    with contextlib.ExitStack() as stack:

        def start(directory: Path, limits: Limits = USUAL, **options: Any) -> Server:
            return stack.enter_context(serving(directory, limits, **options))

        yield start
