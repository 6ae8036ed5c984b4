"""(c) Cross-silo: a GPT-2 of 124 million random weights, four clients with large batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..jobs import write_job, write_random_gpt2, write_random_texts

METHODS: dict[str, dict[str, Any]] = {
    "prefix": {"name": "prefix", "length": 16, "init": "random"},
    "lora": {"name": "lora", "rank": 8},
}


def job(folder: Path, method: str, *, rounds: int = 2, steps: int = 2, clients: int = 4) -> Path:
    """LoRA or a prefix; 2 rounds, 2 steps of 16 x 64 tokens."""
    write_random_gpt2(folder / "base", vocabulary=50257, layers=12, width=768, heads=12)
    data = folder / "data"
    data.mkdir()
    write_random_texts(data / "train.jsonl", rows=clients * steps * 16, tokens=64, vocabulary=50257)
    write_random_texts(data / "test.jsonl", rows=1, tokens=64, vocabulary=50257)
    recipe: dict[str, Any] = {
        "model": {"base": str(folder / "base")},
        "data": {
            "source": str(data), "task": "generation", "test": "test", "development": "test",
            "prompt": "{source}", "target": " {target}", "max_length": 8, "max_target_length": 64,
        },
        "clients": {"partition": "iid", "count": clients, "test_fraction": 0.0},
        "method": METHODS[method],
        "training": {"batch_size": 16, "local_steps": steps, "learning_rate": 0.001},
        "rounds": {"count": rounds},
        "evaluation": {"every": rounds, "untuned": False, "select": "last", "max_new_tokens": 1},
    }  # fmt: skip
    return write_job(recipe, folder / "job")
