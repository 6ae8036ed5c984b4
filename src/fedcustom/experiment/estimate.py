"""How long an experiment will take: from results that are there, or from what its file says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .grid import Cell
from .results import Result
from .settings import ExperimentSettings


@dataclass(frozen=True)
class Rates:
    """Seconds a round, from measured runs and from the file's ``[estimate]``."""

    settings: ExperimentSettings
    measured: Sequence[Result]

    def seconds(self, cell: Cell) -> float | None:
        """A cell's time on one core: as measured on the same points, else as the file's ``[estimate]``
        says; None where nothing is known (of added baselines, before one has run).
        """
        rounds = cell.recipe.rounds.count
        estimate = self.settings.estimate
        if same := [result for result in self.measured if result.points == cell.points]:
            return rounds * sum(r.seconds["total"] / r.rounds for r in same) / len(same)
        if estimate is None or cell.points.get(estimate.axis) not in estimate.seconds:
            return None
        factors = [by.get(cell.points.get(axis, ""), 1.0) for axis, by in estimate.times.items()]
        return rounds * estimate.seconds[cell.points[estimate.axis]] * math.prod(factors)


def total(rates: Rates, cells: Sequence[Cell]) -> tuple[float, int]:
    """The seconds of all cells of which something is known, and how many others there are."""
    known = [seconds for cell in cells if (seconds := rates.seconds(cell)) is not None]
    return sum(known), len(cells) - len(known)
