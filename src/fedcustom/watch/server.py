"""The server of the page: on the loopback interface, for GET alone, of three paths."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ..core.errors import FedcustomError
from ..report.page import render
from ..report.read import read_runs
from .page import page, parts
from .runs import Watched

ADDRESS = "127.0.0.1"
HOSTS = ("127.0.0.1", "localhost")
"""Names by which a browser may ask. Another name in the Host header is a foreign page's, which resolves its
own name to this machine.
"""
SECONDS_A_REQUEST = 20.0
MOST_CONNECTIONS = 32
"""Connections that are answered at a time; more are closed."""


class WatchServer(ThreadingHTTPServer):
    """Serves the page of some runs.

    Args:
        roots: Run directories, or folders that hold some; they need not exist yet.
        port: The port, 0 for a free one.

    Raises:
        OSError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, roots: Sequence[Path], port: int = 0) -> None:
        self.watched = Watched(roots)
        self.title = "Runs" if len(roots) > 1 else f"Runs in {roots[0].name or roots[0]}"
        self._lock = threading.Lock()
        self._drawn: tuple[object, dict[str, str]] | None = None
        self._free = threading.Semaphore(MOST_CONNECTIONS)
        super().__init__((ADDRESS, port), _Handler)

    @property
    def url(self) -> str:
        """The page's address."""
        return f"http://{ADDRESS}:{self.server_port}/"

    def parts(self) -> dict[str, str]:
        """The page's parts as they are now; drawn anew where something has changed."""
        with self._lock:
            signature = self.watched.signature()
            if self._drawn is None or self._drawn[0] != signature:
                self._drawn = signature, parts(*self.watched.runs())
            return self._drawn[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a connection in a thread of its own, or close it where too many are open."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer a connection, and make room for the next."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print a traceback, but not where a browser closed the connection before it had read the answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def report(self) -> str:
        """The report of the finished runs.

        Raises:
            RunError: there is none, or they do not go together.
        """
        with self._lock:
            finished = [live.directory for live in self.watched.runs()[0] if live.state == "finished"]
        return render(read_runs(finished))


class _Handler(BaseHTTPRequestHandler):
    server: WatchServer
    server_version, sys_version = "fedcustom", ""
    timeout = SECONDS_A_REQUEST

    def do_GET(self) -> None:
        """The page, its parts, or the report."""
        port = self.server.server_port
        hosts = {f"{name}:{port}" for name in HOSTS} | ({*HOSTS} if port == 80 else set())
        if self.headers.get_all("Host", []) not in [[host] for host in hosts]:
            self._send(HTTPStatus.FORBIDDEN, "Another host was asked for.\n")
        elif self.path == "/":
            text, policy = page(self.server.parts(), self.server.title)
            self._send(HTTPStatus.OK, text, "text/html", policy)
        elif self.path == "/data":
            self._send(HTTPStatus.OK, json.dumps(self.server.parts()), "application/json")
        elif self.path == "/report":
            try:
                self._send(HTTPStatus.OK, self.server.report(), "text/html", "frame-ancestors 'none'")
            except FedcustomError as error:
                self._send(HTTPStatus.CONFLICT, f"No report: {error}\n")
        else:
            self._send(HTTPStatus.NOT_FOUND, "There is no such page.\n")

    def _refuse(self) -> None:
        self._send(HTTPStatus.METHOD_NOT_ALLOWED, "Only GET is served.\n")

    do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = _refuse

    def _send(self, status: HTTPStatus, text: str, kind: str = "text/plain", policy: str = "") -> None:
        content = text.encode("utf-8", "replace")
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", policy or "default-src 'none'; frame-ancestors 'none'")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET")
            self.close_connection = True
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing of single requests."""
