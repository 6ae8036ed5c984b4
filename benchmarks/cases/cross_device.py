"""(b) Cross-device: MiniLM, TREC-6 over a thousand clients, fifty a round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..jobs import write_job


def job(
    folder: Path,
    data: Path,
    *,
    rounds: int = 4,
    clients: int = 1000,
    per_round: int = 50,
    dtype: str = "float32",
) -> Path:
    """A prefix of 16; one epoch in batches of 8 over five questions a client."""
    recipe: dict[str, Any] = {
        "model": {"dtype": dtype},
        "data": {"source": str(data), "test": "test", "development": "test", "max_length": 48,
                 "test_limit": 8},
        "clients": {"partition": "iid", "count": clients, "test_fraction": 0.0, "minimum_examples": 1},
        "method": {"name": "prefix", "kind": "kv", "length": 16},
        "training": {"batch_size": 8, "local_epochs": 1, "learning_rate": 0.01},
        "rounds": {"count": rounds, "clients_per_round": per_round},
        "evaluation": {"every": rounds, "untuned": False, "select": "last", "batch_size": 128},
    }  # fmt: skip
    return write_job(recipe, folder / f"job-{dtype}")
