"""Questions, documents and their vectors, and a store of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedcustom.methods.retrieval.chunking import digest
from fedcustom.methods.retrieval.store import DocumentStore
from helpers.rows import TOPICS

WORDS = [word for words in TOPICS.values() for word in words]
WIDTH = 8


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Questions with their answers; no two are alike."""
    found = []
    for i in range(start, start + count):
        first, second, third = WORDS[i % 18], WORDS[(i // 18) % 18], WORDS[(7 * i) % 18]
        found.append(
            {
                "question": f"the {first} near the {second}",
                "answer": f"the old {first} sees a {second} with the {third} and then likes the small "
                f"{second} in the {first} of number {i}",
                "site": f"site-{i % 3}",
            }
        )
    return found


def vectors_of(texts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A unit vector for each text, from its hash."""
    rows = []
    for text in texts:
        row = np.random.default_rng(int(digest(text)[:12], 16)).normal(size=WIDTH)
        rows.append(row / np.linalg.norm(row))
    return np.array(rows, dtype=np.float32)


def documents(count: int, start: int = 0) -> list[str]:
    return [
        f"document number {i} about the old river and the house {i % 7}" for i in range(start, start + count)
    ]


def store_in(folder: Path, tokenizer: Any, encoder: str = "e") -> DocumentStore:
    """A store with chunks of eight tokens that overlap by two."""
    return DocumentStore(folder / "store", encoder, tokenizer, (8, 2, None))
