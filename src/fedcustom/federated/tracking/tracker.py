"""A tracker: what is asked of TensorBoard, MLflow and Weights & Biases alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

Scalars = Mapping[str, float]
"""Figures by name, with ``/`` between the parts of a name."""

Outcome = Literal["finished", "failed", "killed"]

Known = dict[str, Any]
"""What ``tracking.json`` remembers of a tracker, so that a run that is resumed goes on in the same place."""


@dataclass(frozen=True)
class Start:
    """A run as its trackers see it: directory, name, group, parameters by dotted name, and recipe as TOML."""

    directory: Path
    name: str
    group: str | None
    parameters: Mapping[str, str]
    recipe: str


class Tracker(Protocol):
    """One tracker of one run. All methods are called in one thread; each may raise anything."""

    name: str

    @property
    def place(self) -> str:
        """Where it tracks. A run that goes on elsewhere is tracked there anew, from its first round."""

    @property
    def variables(self) -> Mapping[str, str]:
        """Variables of the environment that its library reads: set while it works, where they are unset."""

    def open(self, start: Start, known: Known) -> Known:
        """Begin, or go on with what is ``known`` (empty at first); what is to be remembered."""

    def log(self, step: int, scalars: Scalars) -> None:
        """Add the figures of a round that are not there yet."""

    def finish(self, step: int, scalars: Scalars) -> None:
        """Add the final figures and the files of the finished run."""

    def close(self, outcome: Outcome) -> None:
        """Flush and let go."""
