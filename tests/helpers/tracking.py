"""What trackers have of a run, compared with its ``metrics.jsonl``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Points = dict[str, dict[int, list[float]]]
"""Every value that a tracker has, by name and step."""


def expected(directory: Path) -> dict[str, dict[int, float]]:
    """The numbers of ``metrics.jsonl``, counted here in another way than the package does."""
    found: dict[str, dict[int, float]] = {}

    def add(name: str, step: int, value: Any) -> None:
        if isinstance(value, int | float) and not isinstance(value, bool):
            found.setdefault(name, {})[step] = value

    for line in (directory / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        step = row["round"]
        for name in ("cohort", "answered", "left_out", "late"):
            add(name, step, len(row.get(name, ())))
        for name in ("bytes_up", "bytes_down"):
            add(name, step, sum(row.get(name, {}).values()))
        for name in ("bytes_up_total", "bytes_down_total"):
            add(name, step, row.get(name, 0))
        for name in ("round", "learning_rate", "train_loss", "examples", "peak_memory_bytes", "epsilon"):
            add(name, step, row.get(name))
        for table in ("development", "seconds", "method"):
            for name, value in row.get(table, {}).items():
                add(f"{table}/{name}", step, value)
    return found


def check(points: Points, directory: Path, stored: Callable[[float], float] = float) -> None:
    """All numbers of all rounds are there, once each, and none besides but those of the summary; ``stored``
    is how the tracker rounds a number.
    """
    rounds = {name: steps for name, steps in points.items() if not name.startswith("final/")}
    assert {name: set(steps) for name, steps in rounds.items()} == {
        name: set(steps) for name, steps in expected(directory).items()
    }
    for name, steps in expected(directory).items():
        for step, value in steps.items():
            assert points[name][step] == [stored(value)], (name, step)
    summary = json.loads((directory / "summary.json").read_text())
    for name, value in summary["metrics"].items():
        assert list(points[f"final/test/{name}"].values()) == [[stored(value)]]
    assert points["final/total/bytes/up_total"] == {summary["rounds"]: [stored(summary["bytes"]["up_total"])]}


def in_event_files(directory: Path) -> Points:
    """What the event files have, record by record: a point that is there twice counts twice."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util import tensor_util

    found: Points = {}
    for file in sorted((directory / "tensorboard").glob("events.*")):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars" or value.tag in found:
                    number = tensor_util.make_ndarray(value.tensor).item()
                    found.setdefault(value.tag, {}).setdefault(event.step, []).append(number)
    return found


def check_event_files(directory: Path) -> None:
    """TensorBoard's event files have all numbers, in single precision."""
    check(in_event_files(directory), directory, stored=lambda value: float(np.float32(value)))
