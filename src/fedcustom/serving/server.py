"""The server's process: a socket, the model, and a clean end."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn

from .app import LOOPBACK, Limits, make_app
from .served import ROUTES, Served
from .worker import Worker

SHUTDOWN_SECONDS = 10
"""How long callers may take to read what they were sent when the server stops."""

MOST_CONNECTIONS = 512
"""Connections that may be open; requests of further ones are refused (503)."""

OPEN = (
    "and there is no TLS: what is asked and answered can be read on the way; put a proxy with TLS before it"
)


class StoppingServer(uvicorn.Server):
    """A server that lets the model stop writing as soon as it is to end."""

    def __init__(self, config: uvicorn.Config, stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._stop = stop

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Ctrl-C, or a signal to terminate."""
        self._stop()
        super().handle_exit(sig, frame)


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(
    directory: Path,
    *,
    host: str,
    port: int,
    name: str | None,
    api_key: str | None,
    limits: Limits,
    most_tokens: int,
    note: Callable[[str], None],
) -> None:
    """Serve a finished run until a signal ends it (then raised anew, as ``KeyboardInterrupt`` for Ctrl-C).

    The address is taken before the model is loaded; who calls meanwhile waits.

    Raises:
        RunError: see :class:`.served.Served`.
        OSError: the address cannot be listened to.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listening:
        served = Served(directory, name, most_tokens)
        served.warm()
        shown = f"[{host}]" if ":" in host else host
        here = is_loopback(host)
        if not here:
            note(f"warning: {host} is open to other machines, {OPEN}")
            if api_key is None:
                note("warning: no API key is asked for: whoever reaches this address can use the model")
        worker = Worker(limits.waiting, limits.seconds, note)
        app = make_app(served, worker, limits, api_key=api_key, hosts=(*LOOPBACK, shown) if here else None)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
        address = f"http://{shown}:{listening.getsockname()[1]}"
        note(f"{served.name} answers {' and '.join(ROUTES[served.kind])} at {address}; Ctrl-C ends")
        try:
            StoppingServer(config, worker.stop).run(sockets=[listening])
        finally:
            worker.close()
