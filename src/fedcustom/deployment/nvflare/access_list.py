"""Access list: the certificates that a federation's server accepts, by participant's name.

The engine's process reads it, so this module imports neither torch nor the engine.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

FILE = "access.json"
"""File in the server's kit."""


class AccessList:
    """Access list in a file that may change at any time; every question is answered by its present content.

    A certificate is accepted if its SHA-256 fingerprint is listed; the authority's signature is not enough.
    A file that is missing or damaged accepts nobody (``problem`` says what is wrong with it).
    """

    def __init__(self, file: Path) -> None:
        self.file, self.problem = file, ""
        self._state: tuple[int, int, int] | None = None
        self._content: dict[str, frozenset[str]] = {}

    def names(self) -> frozenset[str]:
        """Names with at least one accepted certificate."""
        return frozenset(name for name, listed in self._read().items() if listed)

    def accepts(self, certificate: bytes, name: str | None = None) -> bool:
        """Whether a certificate (DER) is accepted; with ``name``, only as that participant's."""
        digest = fingerprint(certificate)
        content = self._read()
        if name is not None:
            return digest in content.get(name, frozenset())
        return any(digest in listed for listed in content.values())

    def _read(self) -> dict[str, frozenset[str]]:
        try:
            found = self.file.stat()
            state = (found.st_ino, found.st_mtime_ns, found.st_size)
            if state != self._state:
                content = json.loads(self.file.read_text(encoding="utf-8"))
                self._content = {
                    str(name): frozenset(map(str, listed))
                    for name, listed in content.items()
                    if isinstance(listed, list)
                }
                self._state, self.problem = state, ""
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            self._content, self._state = {}, None
            self.problem = f"{self.file}: nobody is let in: {type(error).__name__}: {error}"
        return self._content


def fingerprint(certificate: bytes) -> str:
    """SHA-256 of a certificate (DER) in hexadecimal digits."""
    return hashlib.sha256(certificate).hexdigest()
