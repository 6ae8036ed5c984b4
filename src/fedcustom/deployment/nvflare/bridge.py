"""Local connection between a resident process and the engine's job process beside it.

Messages are JSON; the tensors of a message lie in a file whose path it names. The connection is a socket in
a folder that only this user can open, and begins with a challenge on a key; nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
import threading
import time
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

ADDRESS_VARIABLE = "FEDCUSTOM_BRIDGE"
"""Environment variable with the path of the file that says where the resident process listens."""

MAX_JSON_BYTES = 256 * 2**20

Message = dict[str, Any]


class BridgeError(ConnectionError):
    """The process at the other end is not there, or has gone."""


class Bridge:
    """An open local connection; messages may be sent from several threads."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._send_lock = threading.Lock()

    def send(self, message: Message) -> None:
        """Send one message.

        Raises:
            BridgeError: the other end has gone.
        """
        try:
            with self._send_lock:
                self._connection.send_bytes(json.dumps(message).encode())
        except (OSError, ValueError) as error:
            raise BridgeError(str(error)) from None

    def receive(self, timeout: float | None = None) -> Message | None:
        """The next message; None if none comes within ``timeout`` seconds.

        Raises:
            BridgeError: the other end has gone.
        """
        try:
            if not self._connection.poll(timeout):
                return None
            message = json.loads(self._connection.recv_bytes(MAX_JSON_BYTES))
        except (OSError, EOFError, ValueError) as error:
            raise BridgeError(str(error) or "the connection was closed") from None
        if not isinstance(message, dict):
            raise BridgeError("not a message")
        return message

    def close(self) -> None:
        """Close this end."""
        self._connection.close()


class BridgeListener:
    """Listening end of the local connection: a socket, and the file that names it with its key.

    The socket is in a temporary folder that only this user can open, because a socket's path may have some
    hundred characters at most.
    """

    def __init__(self, file: Path) -> None:
        key = secrets.token_bytes(32)
        self._closed, self._folder = False, Path(tempfile.mkdtemp(prefix="fedcustom-"))
        address = str(self._folder / "door")
        self._listener = Listener(address, family="AF_UNIX", backlog=16, authkey=key)
        content = json.dumps({"address": address, "key": key.hex()})
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(".new")
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
            out.write(content)
        draft.replace(file)
        self.file = file

    def accept(self) -> Bridge:
        """Wait for the next connection whose other end knows the key; others are refused.

        Raises:
            BridgeError: the listener has been closed.
        """
        from multiprocessing import AuthenticationError

        while True:
            try:
                return Bridge(self._listener.accept())
            except (AuthenticationError, EOFError, OSError) as error:
                if self._closed:
                    raise BridgeError(str(error)) from None
                time.sleep(0.01)

    def close(self) -> None:
        """Stop listening, and remove the socket and the file that names it."""
        self._closed = True
        self._listener.close()
        self.file.unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)


def connect(file: Path | None = None) -> Bridge:
    """Connect to the resident process that the file, or the environment, names.

    Raises:
        BridgeError: it is not there.
    """
    from multiprocessing import AuthenticationError

    address_file = file or Path(os.environ.get(ADDRESS_VARIABLE, ""))
    try:
        content = json.loads(address_file.read_text())
        return Bridge(Client(str(content["address"]), authkey=bytes.fromhex(content["key"])))
    except (OSError, EOFError, ValueError, KeyError, AuthenticationError) as error:
        raise BridgeError(f"{address_file}: {error}") from None
