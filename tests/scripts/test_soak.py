"""The soak test's plan of kills, its measurements and its tables; without a federation."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

from scripts.soak import KINDS, Kill, facts_of, plan_kills, size, tables


def test_every_kind_of_process_is_killed_in_turn() -> None:
    kills = plan_kills(16, 300, list(KINDS), seed=1)
    assert kills == plan_kills(16, 300, list(KINDS), seed=1)
    assert kills != plan_kills(16, 300, list(KINDS), seed=2)
    assert sorted(Counter(kill.kind for kill in kills).values()) == [2, 2, 2, 2, 2, 3, 3]
    assert [kill.round for kill in kills] == sorted(kill.round for kill in kills)
    assert all(1 <= kill.round <= 270 for kill in kills), "the last tenth of the rounds has none"
    assert plan_kills(2, 2, ["run"], seed=0) == [Kill("run", 1), Kill("run", 1)]


def test_a_process_is_measured(tmp_path: Path) -> None:
    before = facts_of(os.getpid())
    assert before is not None
    with (tmp_path / "a").open("w"), (tmp_path / "b").open("w"):
        after = facts_of(os.getpid())
    assert after is not None
    assert after["descriptors"] == before["descriptors"] + 2
    assert after["MB"] > 1
    assert after["threads"] >= 1
    assert facts_of(2**30) is None
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "d").write_bytes(b"123")
    (tmp_path / "c" / "e").symlink_to(tmp_path / "a")
    assert size(tmp_path) == 8
    assert size(tmp_path / "missing") == 0


def test_the_tables_have_medians_of_the_thirds() -> None:
    kills = [
        {"kind": "run", "seconds": 3.0, "skipped": ""}, {"kind": "run", "seconds": 5.0, "skipped": ""},
        {"kind": "site job", "seconds": None, "skipped": "no such process"},
    ]  # fmt: skip
    samples: list[dict[str, Any]] = [
        {"kinds": {"run": {"MB": 10.0 * n, "threads": 3, "descriptors": n}}, "disk": {}} for n in range(1, 10)
    ]
    samples[0]["disk"] = {"run MB": 1}
    result = {
        "sites": 3, "rounds": 20, "rounds reached": 19, "seconds": 1.5, "starts of the run": 2,
        "failure": "late",
        "difference": 0.0, "compared": "8 numbers", "kills": kills, "samples": samples,
        "left in the temporary folder": [],
    }  # fmt: skip
    text = tables(result)
    assert "19 of 20 rounds in 1.5 s, 2 starts of the run; difference 0.0 (8 numbers); FAILED: late" in text
    assert "| run | 2 | 0 | 4.0 | 5.0 |" in text
    assert "| site job | 0 | 1 | - | - |" in text
    assert "| run | MB | 20 | 80 | 90 |" in text
    assert "| run | threads | 3 | 3 | 3 |" in text
    assert "| disk | run MB | 1 | 1 | 1 |" in text
    assert text.endswith("left in the temporary folder: nothing")
