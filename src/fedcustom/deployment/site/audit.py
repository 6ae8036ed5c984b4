"""Audit log of a site: every message that leaves it, readable for a compliance officer."""

from __future__ import annotations

import hashlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

LONGEST_TEXT = 1000
"""Characters of a text that a line holds at most: a message cannot fill the disk by its texts."""


class AuditLog:
    """Audit log ``audit.jsonl``: a line for each event, flushed to the disk before the message leaves.

    Texts of others are cut to :data:`LONGEST_TEXT` characters and written in ASCII with JSON's escapes, so
    that no text can end a line, reach a terminal as a control sequence, or fail to be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, event: str, **facts: Any) -> None:
        """Append one line: the time (UTC), what happened, and facts about it."""
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event}
        for key, value in facts.items():
            line[key] = value[:LONGEST_TEXT] if isinstance(value, str) else value
        with self.path.open("a", encoding="ascii") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def digest(text: str, body: Path | None) -> str:
    """SHA-256 of a message: its JSON and then its file of tensors."""
    hashed = hashlib.sha256(text.encode(errors="surrogatepass"))
    if body is not None:
        with body.open("rb") as file:
            while block := file.read(2**20):
                hashed.update(block)
    return hashed.hexdigest()
