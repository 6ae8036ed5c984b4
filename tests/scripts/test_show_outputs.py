"""The script that puts several runs' outputs side by side."""

from __future__ import annotations

from pathlib import Path

from scripts.show_outputs import labelled


def test_runs_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    runs = [tmp_path / "e2e" / method / "seed-0" for method in ("prefix", "lora")]
    assert labelled(runs) == {"prefix/seed-0": runs[0], "lora/seed-0": runs[1]}
    assert labelled(runs[:1]) == {"seed-0": runs[0]}
