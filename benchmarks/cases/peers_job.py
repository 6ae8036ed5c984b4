"""(a) The peers' job: a tiny GPT-2, prefix-tuning, four clients with much to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..jobs import write_job, write_random_gpt2, write_random_texts


def job(
    folder: Path, *, rounds: int = 5, steps: int = 20, clients: int = 4, batch_size: int = 8, workers: int = 0
) -> Path:
    """4 layers of 128, 512 words; a prefix of 10; 4 clients, 5 rounds, 20 steps of 8 x 64 tokens. With
    ``workers`` our engine trains the clients in so many processes.
    """
    write_random_gpt2(folder / "base", vocabulary=512, layers=4, width=128, heads=4)
    data = folder / "data"
    data.mkdir()
    write_random_texts(data / "train.jsonl", rows=clients * steps * batch_size, tokens=64, vocabulary=512)
    write_random_texts(data / "test.jsonl", rows=4, tokens=64, vocabulary=512)
    recipe: dict[str, Any] = {
        "model": {"base": str(folder / "base")},
        "data": {
            "source": str(data), "task": "generation", "test": "test", "development": "test",
            "prompt": "{source}", "target": " {target}", "max_length": 8, "max_target_length": 64,
        },
        "clients": {"partition": "iid", "count": clients, "test_fraction": 0.0},
        "method": {"name": "prefix", "length": 10, "init": "random"},
        "training": {"batch_size": batch_size, "local_steps": steps, "learning_rate": 0.01},
        "rounds": {"count": rounds},
        "evaluation": {"every": rounds, "untuned": False, "select": "last", "max_new_tokens": 1},
    }  # fmt: skip
    if workers:
        recipe["workers"] = {"count": workers}
    return write_job(recipe, folder / "job")
