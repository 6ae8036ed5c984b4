"""A small federation of questions and answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.retrieval import rows
from helpers.rows import write_jsonl


@pytest.fixture
def recipe(tmp_path: Path, tiny: dict[str, str]) -> dict[str, Any]:
    source = tmp_path / "source"
    source.mkdir()
    write_jsonl(source / "train.jsonl", rows(45))
    write_jsonl(source / "test.jsonl", rows(12, 45))
    return {
        "model": {"base": tiny["bert"]},
        "data": {
            "source": str(source), "task": "retrieval", "test": "test", "prompt": "{question}",
            "target": "{answer}", "max_length": 16, "max_target_length": 24,
        },
        "clients": {"partition": "natural", "column": "site", "test_fraction": 0.0},
        "method": {"name": "retrieval", "chunk_length": 12, "chunk_overlap": 4},
        "rounds": {"count": 1},
    }  # fmt: skip
