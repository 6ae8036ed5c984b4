"""Recipes of deployed runs on tiny models, and their data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers.rows import make_rows, write_jsonl


def written(folder: Path, train: list[dict[str, Any]], test: list[dict[str, Any]]) -> Path:
    """A new folder with two parts of a data set."""
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "test.jsonl", test)
    return folder


def dealt_recipe(base: str, source: Path, count: int, **sections: Any) -> dict[str, Any]:
    """Prefix-tuning by so many clients to whom rows are dealt, with these sections beside or instead."""
    return {
        "model": {"base": base},
        "data": {"source": str(source), "test": "test", "max_length": 16},
        "clients": {"partition": "iid", "count": count},
        "method": {"name": "prefix", "length": 4},
        **sections,
    }


def owners_recipe(base: str, folder: Path, owners: Sequence[int], **sections: Any) -> dict[str, Any]:
    """Prefix-tuning by the owners of rows: ``owners`` names that of each training row, which are written to
    the new ``folder``; with these sections beside or instead.
    """
    rows = zip(make_rows(len(owners), 0), owners, strict=True)
    train = [{**row, "owner": f"o{owner}"} for row, owner in rows]
    return {
        "model": {"base": base},
        "data": {"source": str(written(folder, train, make_rows(20, 2))), "test": "test", "max_length": 24},
        "clients": {"partition": "natural", "column": "owner"},
        "method": {"name": "prefix", "length": 4},
        **sections,
    }


def blocks(*sizes: int) -> list[int]:
    """Owners of rows, of whom each has so many one after the other."""
    return [owner for owner, size in enumerate(sizes) for _ in range(size)]
