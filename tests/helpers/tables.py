"""Small invented tables in several formats."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

WORDS = (
    "room", "hotel", "food", "service", "staff", "breakfast", "clean", "dirty", "noisy", "quiet", "view",
    "sea",
)  # fmt: skip


def phrase(draw: random.Random, least: int = 5, most: int = 12) -> str:
    """Some words."""
    return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))


def table(count: int, **columns: Callable[[int, random.Random], Any]) -> list[dict[str, Any]]:
    """Rows whose cells are made from the row's number and a random draw."""
    draw = random.Random(7)
    return [{name: make(number, draw) for name, make in columns.items()} for number in range(count)]


def turns(draw: random.Random) -> list[dict[str, str]]:
    """A conversation of two exchanges."""
    roles = ("user", "assistant", "user", "assistant")
    return [{"role": role, "content": phrase(draw, 3, 6)} for role in roles]


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as CSV, JSONL or Parquet, by the file's ending."""
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        import pandas as pd

        pd.DataFrame(list(rows)).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
