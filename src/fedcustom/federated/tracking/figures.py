"""Which figures of a run trackers get: numbers of metrics.jsonl and summary.json, and the recipe."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ...recipe import Recipe, to_toml
from ..history_frames import round_figures
from ..run_directory import Row

FINAL = {
    "metrics": "test",
    "untuned": "untuned",
    "client_mean": "client_mean",
    "worst_client": "worst_client",
    "bytes": "total/bytes",
    "seconds": "total/seconds",
}
"""Tables of ``summary.json``, and the name under which a tracker has them."""

FINAL_NUMBERS = ("best_round", "trainable_parameters", "head_parameters", "peak_memory_bytes", "temperature")


def of_round(row: Row) -> dict[str, float]:
    """The figures of a line of ``metrics.jsonl``: lists of clients as their lengths, bytes summed over
    clients, no client's own figure.
    """
    return _numbers(round_figures(row))


def of_summary(summary: Mapping[str, Any]) -> dict[str, float]:
    """The figures of ``summary.json``, without those of single clients."""
    flat: dict[str, Any] = {f"final.{name}": summary.get(name) for name in FINAL_NUMBERS}
    for table, name in FINAL.items():
        flat |= {f"final.{name}.{key}": value for key, value in (summary.get(table) or {}).items()}
    return _numbers(flat)


def parameters(recipe: Recipe) -> dict[str, str]:
    """Every setting of a recipe that is set, as text by its dotted name, but those of its trackers."""
    flat: dict[str, str] = {}

    def add(values: Mapping[str, Any], prefix: str) -> None:
        for key, value in values.items():
            if isinstance(value, Mapping):
                add(value, f"{prefix}{key}.")
            else:
                flat[prefix + key] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    add(recipe.untracked.model_dump(exclude={"compare"}, exclude_none=True), "")
    return flat


def recipe_text(recipe: Recipe) -> str:
    """The recipe as TOML, without its trackers."""
    return to_toml(recipe.untracked)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers, with names that every tracker takes."""
    return {
        re.sub(r"[^\w\-./ ]", "_", name.replace(".", "/")): value
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
