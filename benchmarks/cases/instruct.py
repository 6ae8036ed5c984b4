"""(g) SmolLM2: four clients with eight rows of 128 tokens of Dolly each step, LoRA and a key-value prefix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedcustom.data.cells import Row
from fedcustom.data.files import read_file

from ..jobs import write_job
from .cross_silo import METHODS as METHODS

TOKENS, BATCH, STEPS = 128, 8, 1
DEVELOPMENT = 32
"""Rows that nobody trains on, on which all engines' results are compared."""


def job(
    folder: Path,
    method: str,
    dolly: Path,
    *,
    rounds: int = 2,
    steps: int = STEPS,
    clients: int = 4,
    development: int = DEVELOPMENT,
    base: str = "builtin:smollm2",
) -> Path:
    """Rows whose context and answer fill 64 tokens each; the loss is that of the answer alone. The run itself
    evaluates a single row; the development rows are for the comparison of engines afterwards.
    """
    data = folder / "data"
    data.mkdir(parents=True)
    long = [row for row in read_file(dolly / "train.jsonl") if _words(row) > TOKENS]
    wanted = clients * steps * BATCH
    held_out = long[wanted : wanted + development]
    for name, rows in (("train", long[:wanted]), ("test", held_out[:1]), ("development", held_out)):
        lines = [json.dumps({"source": r["context"], "target": " " + r["response"]}) + "\n" for r in rows]
        (data / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    recipe: dict[str, Any] = {
        "model": {"base": base},
        "data": {
            "source": str(data), "task": "generation", "test": "test", "development": "test",
            "prompt": "{source}", "target": "{target}", "max_length": 64, "max_target_length": 64,
        },
        "clients": {"partition": "iid", "count": clients, "test_fraction": 0.0},
        "method": METHODS[method],
        "training": {"batch_size": BATCH, "local_steps": steps, "learning_rate": 0.001},
        "rounds": {"count": rounds},
        "evaluation": {"every": rounds, "untuned": False, "select": "last", "generate": False},
    }  # fmt: skip
    return write_job(recipe, folder / "job", development="development")


def _words(row: Row) -> int:
    """Words of the shorter of context and response, twice: both must be longer than half of the tokens."""
    return 2 * min(len(str(row["context"]).split()), len(str(row["response"]).split()))
