"""Local connection between a resident process and the engine's job process beside it.

Messages are JSON; the tensors of a message lie in a file whose path it names. The connection is a socket in
a folder that only this user can open, and begins with a challenge on a key; nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import stat
import tempfile
import threading
import time
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

ADDRESS_VARIABLE = "FEDCUSTOM_BRIDGE"
"""Environment variable with the path of the file that says where the resident process listens."""

LIMIT_VARIABLE = "FEDCUSTOM_MAX_REQUEST_BYTES"
"""Environment variable with the size of the largest request that a site receives, in bytes."""

PREFIX, SOCKET, LOCK = "fedcustom-", "door", "lock"
"""Names of a socket's folder in the temporary folder (its beginning), of the socket in it, and of its lock
file.
"""

MAX_SOCKET_PATH = 100
"""Bytes of a socket's path; systems allow 104 or 108."""

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

    The socket is in a folder that only this user can open: beside the file where its path is short enough
    for a socket, else in the system's temporary folder. What a killed process left there is removed by the
    next.
    """

    def __init__(self, file: Path) -> None:
        key = secrets.token_bytes(32)
        file.parent.mkdir(parents=True, exist_ok=True)
        self._closed, self._lock = False, -1
        self._folder, self._listener = self._listen(file, key)
        content = json.dumps({"address": str(self._folder / SOCKET), "key": key.hex()})
        draft = file.with_suffix(".new")
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
            out.write(content)
        draft.replace(file)
        self.file = file

    def _listen(self, file: Path, key: bytes) -> tuple[Path, Listener]:
        folder = file.parent.absolute() / f"{file.stem}.socket"
        if len(os.fsencode(folder / SOCKET)) <= MAX_SOCKET_PATH:
            with contextlib.suppress(OSError):  # a file system without sockets
                folder.mkdir(mode=0o700, exist_ok=True)
                folder.chmod(0o700)
                (folder / SOCKET).unlink(missing_ok=True)
                return folder, _listener(folder, key)
            shutil.rmtree(folder, ignore_errors=True)
        remove_stale_folders()
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        self._lock = _lock(folder)
        return folder, _listener(folder, key)

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
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def remove_stale_folders() -> list[Path]:
    """Remove the folders for sockets that killed processes of this user left in the temporary folder.

    A folder in use is locked by its process. One without a lock file is left alone for a minute: its process
    may be about to lock it.
    """
    removed = []
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # not ours, in use, or removed meanwhile
            facts = folder.lstat()
            names = {path.name for path in folder.iterdir()}
            ours = stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid() and names <= {SOCKET, LOCK}
            if not ours or (LOCK not in names and (names or time.time() - facts.st_mtime < 60.0)):
                continue
            lock = _lock(folder)
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
            removed.append(folder)
    return removed


def _lock(folder: Path) -> int:
    """Lock a socket's folder until the descriptor is closed, or this process ends.

    Raises:
        OSError: another process holds it.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _listener(folder: Path, key: bytes) -> Listener:
    return Listener(str(folder / SOCKET), family="AF_UNIX", backlog=16, authkey=key)


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
