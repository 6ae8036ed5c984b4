"""(b) Cross-device: MiniLM, TREC-6 over a thousand clients, fifty a round."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from fedcustom.models.configuration import locate

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
    """A prefix of 16; one epoch in batches of 8 over five questions a client. The classifier is BERT's own,
    which the others load too: without what says how sentences are pooled.
    """
    base = folder / f"minilm-{dtype}"
    shutil.copytree(
        locate("builtin:minilm"), base, ignore=shutil.ignore_patterns("modules.json", "1_Pooling")
    )
    recipe: dict[str, Any] = {
        "model": {"base": str(base), "dtype": dtype},
        "data": {"source": str(data), "test": "test", "development": "test", "max_length": 48,
                 "test_limit": 8},
        "clients": {"partition": "iid", "count": clients, "test_fraction": 0.0, "minimum_examples": 1},
        "method": {"name": "prefix", "kind": "kv", "length": 16},
        "training": {"batch_size": 8, "local_epochs": 1, "learning_rate": 0.01},
        "rounds": {"count": rounds, "clients_per_round": per_round},
        "evaluation": {"every": rounds, "untuned": False, "select": "last", "batch_size": 128},
    }  # fmt: skip
    return write_job(recipe, folder / f"job-{dtype}")
