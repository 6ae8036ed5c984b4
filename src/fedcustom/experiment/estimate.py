"""How long an experiment will take: from results that are there, or from what its file says."""

from __future__ import annotations

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
        """A cell's time on one core: as measured on the same points, else on the same point of the axis of
        ``[estimate]``, else as the file says; None where nothing is known.
        """
        rounds = cell.recipe.rounds.count
        estimate = self.settings.estimate
        same = [result for result in self.measured if result.points == cell.points]
        if not same and estimate is not None:
            axis = estimate.axis
            same = [result for result in self.measured if result.points.get(axis) == cell.points[axis]]
        if same:
            each = [result.seconds["total"] / result.rounds for result in same]
            return rounds * sum(each) / len(each)
        if estimate is None or cell.points[estimate.axis] not in estimate.seconds:
            return None
        return rounds * estimate.seconds[cell.points[estimate.axis]]


def total(rates: Rates, cells: Sequence[Cell]) -> tuple[float, int]:
    """The seconds of all cells of which something is known, and how many others there are."""
    known = [seconds for cell in cells if (seconds := rates.seconds(cell)) is not None]
    return sum(known), len(cells) - len(known)
