"""Differences between cells that share seeds: the same seed has the same clients and cohorts, so that much of
what varies between seeds falls out of a difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..report import formatting as words
from ..report.groups import PERCENT_METRICS, mean_and_interval
from .baselines import deciding_axes
from .results import Result
from .settings import BASELINE, ExperimentSettings
from .tables import Facet, Replicates, Table, facets, metric_of

POINTS = ("accuracy", "macro_f1", "calibration_error", "choice_accuracy", "preference_accuracy")
"""Metrics from 0 to 1 whose differences are shown in points, hundredths."""


def paired_difference(
    mine: Sequence[Result], other: Sequence[Result], metric: str
) -> tuple[float, float, int] | None:
    """By how much ``mine`` are above ``other`` on the test split: the mean over the seeds that both have,
    half the width of its 95 % interval (Student's t; NaN for one seed), and how many seeds those are. None
    where there is none.
    """
    theirs = {result.seed: result.metrics.get(metric, math.nan) for result in other}
    differences = [
        result.metrics.get(metric, math.nan) - theirs[result.seed] for result in mine if result.seed in theirs
    ]
    known = [value for value in differences if not math.isnan(value)]
    if not known:
        return None
    mean, half = mean_and_interval(known)
    return mean, half, len(known)


def paired_tables(settings: ExperimentSettings, groups: Sequence[Replicates]) -> list[Table]:
    """A table for each facet and each entry of ``[report] against``: differences to the cells that lie on the
    entry's points and, on all other axes, on the points of the cell itself.
    """
    metric = metric_of(settings.report, groups)
    tables = []
    for against in settings.report.against:
        said = ", ".join(f"{axis} {point}" for axis, point in against.items())
        for facet in facets(settings, groups):
            rows = [[row, *_cells(settings, facet, groups, row, against, metric)] for row in facet.rows]
            rows = [row for row in rows if any(cell != words.MISSING for cell in row[1:])]
            heading = f"{words.capitalised(words.metric_name(metric))} less that of {said}, paired by seed"
            heading = f"{facet.heading}: {heading}" if facet.heading else heading
            if metric in POINTS:
                heading += ", in points"
            if rows:
                tables.append(Table(heading, ["", *facet.columns], rows))
    return tables


def _cells(
    settings: ExperimentSettings,
    facet: Facet,
    groups: Sequence[Replicates],
    row: str,
    against: dict[str, str],
    metric: str,
) -> list[str]:
    found = []
    for column in facet.columns:
        mine = facet.places.get((row, column))
        other = None if mine is None else _partner(settings, groups, mine, against)
        if mine is None or other is None or other is mine:
            found.append(words.MISSING)
            continue
        difference = paired_difference(mine.results, other.results, metric)
        found.append(words.MISSING if difference is None else shown(difference, metric))
    return found


def _partner(
    settings: ExperimentSettings, groups: Sequence[Replicates], mine: Replicates, against: dict[str, str]
) -> Replicates | None:
    """What a group is compared with; None where it has not been run."""
    if settings.is_added(mine.points):
        return None
    wanted = {**mine.points, **against}
    if BASELINE in against and settings.baselines:
        axes = deciding_axes(settings)
        wanted = {BASELINE: against[BASELINE]} | {axis: mine.points[axis] for axis in axes}
    return next((group for group in groups if group.points == wanted), None)


def shown(difference: tuple[float, float, int], metric: str) -> str:
    """A difference with its interval, as in ``-1.2 ± 0.9 (3 seeds)``."""
    mean, half, seeds = difference
    scale, places = (100, 1) if metric in POINTS else (1, 1 if metric in PERCENT_METRICS else 3)
    interval = "" if math.isnan(half) else f" ± {scale * half:.{places}f}"
    return f"{scale * mean:+.{places}f}{interval} ({words.plural(seeds, 'seed')})"
