"""Private keys and certificates in tests: where a key is, and whether a server lets a certificate in."""

from __future__ import annotations

import socket
import ssl
import time
from pathlib import Path


def key_bodies(folder: Path) -> list[bytes]:
    """A line from the middle of every private key under a folder."""
    return sorted({_body(path.read_bytes()) for path in folder.rglob("*.key") if path.is_file()})


def _body(pem: bytes) -> bytes:
    lines = pem.split(b"\n")
    assert lines[0].startswith(b"-----BEGIN"), lines[0]
    return lines[len(lines) // 2]


def where_key_is(body: bytes, folder: Path) -> list[Path]:
    """The files under a folder that hold this line of a key."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and body in path.read_bytes())


def wait_for_port(port: int, seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < until, "the server does not listen"
            time.sleep(0.2)


def knock(port: int, authority: Path, certificate: Path | None = None, key: Path | None = None) -> str:
    """Whether a server lets a client with this certificate in, or what it says instead."""
    context = ssl.create_default_context(cafile=str(authority))
    if certificate is not None:
        context.load_cert_chain(str(certificate), str(key))
    try:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as secure,
        ):
            secure.settimeout(2.0)
            try:
                return "let in" if secure.recv(1) else "closed"
            except TimeoutError:
                return "let in"  # the server waits for what a site has to say
    except OSError as error:
        return str(error).replace("_", " ")
