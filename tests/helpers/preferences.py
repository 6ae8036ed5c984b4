"""Ten preference pairs, and recipes on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.conversations import ANIMALS
from helpers.rows import write_jsonl


def preferences() -> list[dict[str, str]]:
    """Rows with ``prompt``, ``chosen`` and ``rejected``, all of them texts; rejected answers are longer."""
    return [
        {
            "prompt": f"Who is the {animal}?",
            "chosen": f"The {animal} has number {number}.",
            "rejected": f"That is the {ANIMALS[(number + 3) % len(ANIMALS)]}. And its friend?",
        }
        for number, animal in enumerate(ANIMALS)
    ]


def user(text: str) -> dict[str, str]:
    """A turn of a user."""
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    """An answer."""
    return {"role": "assistant", "content": text}


def preference_recipe(folder: Path, base: str, **data: Any) -> dict[str, Any]:
    """A recipe on the pairs, which are written to ``folder``; all of them are tested."""
    write_jsonl(folder / "train.jsonl", preferences())
    given = {"development": "train", "test": "train", "max_length": 100, "max_target_length": 40, **data}
    return {
        "model": {"base": base},
        "data": {"source": str(folder / "train.jsonl"), **given},
        "clients": {"partition": "iid", "count": 2, "test_fraction": 0.0, "development_fraction": 0.0},
        "method": {"name": "lora", "rank": 4},
        "training": {"objective": "dpo", "batch_size": 5, "local_steps": 2},
        "rounds": {"count": 2},
        "evaluation": {"max_new_tokens": 8},
    }
