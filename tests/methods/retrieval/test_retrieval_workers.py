"""Searches whose clients are at workers: each asks outside rounds, and keeps its documents on its disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.recipes import changed
from helpers.runs import rows_of, without_seconds
from helpers.workers import StandIn, run_both, stand_in

__all__ = ["stand_in"]


@pytest.mark.parametrize("dies", [{}, {1: 2}, {0: 5}])
def test_the_same_documents_are_found(
    dies: dict[int, int], recipe: dict[str, Any], tmp_path: Path, stand_in: StandIn
) -> None:
    stand_in.dies = dies
    one, many = run_both(changed(recipe, train="lora") if "train" in recipe["method"] else recipe, tmp_path)
    assert (one / "predictions.jsonl").read_text() == (many / "predictions.jsonl").read_text()
    assert [without_seconds(row) for row in rows_of(one)] == [without_seconds(row) for row in rows_of(many)]
    first, second = (json.loads((run / "retrieval.json").read_text()) for run in (one, many))
    assert (
        first["searches"]["as set"]["bytes_down_per_query"]
        == second["searches"]["as set"]["bytes_down_per_query"]
    )
    assert sorted(path.name for path in (one / "clients").iterdir()) == sorted(
        path.name for path in (many / "clients").iterdir()
    )
