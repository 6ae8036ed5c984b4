"""Seeds that are the same on every machine."""

from __future__ import annotations

import hashlib


def name_seed(name: str) -> int:
    """A number for a client's name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
