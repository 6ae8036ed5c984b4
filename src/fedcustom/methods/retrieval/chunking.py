"""Chunking: documents cut to an encoder's window."""

from __future__ import annotations

import hashlib
from typing import Any


def chunks(text: str, tokenizer: Any, length: int, overlap: int, most: int | None) -> list[str]:
    """Pieces of at most ``length`` tokens, each of which begins ``overlap`` tokens before the last one's end;
    the first ``most`` of them. A text without tokens is one piece.
    """
    encoding = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
    )
    offsets = encoding["offset_mapping"]
    if not offsets:
        return [text]
    pieces = []
    for start in range(0, len(offsets), length - overlap):
        part = offsets[start : start + length]
        pieces.append(text[part[0][0] : part[-1][1]])
        if start + length >= len(offsets) or len(pieces) == most:
            break
    return pieces


def digest(text: str) -> str:
    """A document's name: 16 bytes of its content's hash, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]
