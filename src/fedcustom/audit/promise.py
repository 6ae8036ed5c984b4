"""The promise of a run: the epsilon of its differential privacy, from ``privacy.json``."""

from __future__ import annotations

import math
from pathlib import Path

from ..core.errors import RunError
from ..core.files import read_json

FILE = "privacy.json"
"""The file of a private run's guarantee."""

DELTA = 1e-5
"""The delta of lower bounds on epsilon where a run promises none."""


def promised_epsilon(directory: Path) -> float | None:
    """The epsilon that a run promises; None where it promises none.

    Raises:
        RunError: ``privacy.json`` is no guarantee that can be read.
    """
    return _positive(directory, "epsilon")


def promised_delta(directory: Path) -> float:
    """The delta that a run promises, or :data:`DELTA`.

    Raises:
        RunError: ``privacy.json`` is no guarantee that can be read.
    """
    return _positive(directory, "delta") or DELTA


def _positive(directory: Path, key: str) -> float | None:
    file = directory / FILE
    if not file.exists():
        return None
    content = read_json(file)
    value = content.get(key) if isinstance(content, dict) else None
    if value is None and isinstance(content, dict):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise RunError(f"{file}: {key} = {value!r}: must be a positive number")
    return float(value)
