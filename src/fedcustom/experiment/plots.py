"""The plot of a facet: a mark a mean, with its 95 % interval."""

from __future__ import annotations

import math

from ..report import formatting as words
from ..report.axes import Axis, Tick, linear, value_range
from ..report.svg import MARKS, Chart, Mark
from .tables import Facet

COLOURS = ("#0b7285", "#c2410c", "#5b3fa8", "#3f7d20", "#b0215e", "#8a6d00", "#4a5568", "#1d4ed8")
SYMBOLS = [name for name in MARKS if name != "hit"]
HEIGHT = 260
MOST_APART = 0.02
"""How far rows stand apart at most in their column, as a part of the plot's width."""


def dot_plot(facet: Facet, metric: str) -> str:
    """One plot as SVG, without any script: the facet's columns along x, its rows as colours with a legend.
    Empty where nothing was measured.
    """
    means = {
        place: group.mean(lambda result: result.metrics.get(metric, math.nan))
        for place, group in facet.places.items()
    }
    means = {place: pair for place, pair in means.items() if not math.isnan(pair[0])}
    if not means:
        return ""
    ends = [mean + sign * _known(half) for mean, half in means.values() for sign in (-1, 1)]
    step = 1 / len(facet.columns)
    ticks = tuple(Tick((place + 0.5) * step, name) for place, name in enumerate(facet.columns))
    colours = {row: COLOURS[number % len(COLOURS)] for number, row in enumerate(facet.rows)}
    chart = Chart(
        Axis(0, len(facet.columns), ticks), linear(*value_range(ends, metric)), "",
        height=HEIGHT, grid="y", colours=colours,
    )  # fmt: skip
    apart = min(MOST_APART, 0.8 * step / len(facet.rows))
    for number, row in enumerate(facet.rows):
        marks, symbol = list[Mark](), SYMBOLS[number % len(SYMBOLS)]
        for place, column in enumerate(facet.columns):
            if (row, column) not in means:
                continue
            mean, half = means[row, column]
            x = (place + 0.5) * step + (number - (len(facet.rows) - 1) / 2) * apart
            ends = [chart.y.place(mean + sign * _known(half)) for sign in (-1, 1)]
            low, high = max(0.0, ends[0]), min(1.0, ends[1])  # an axis ends where the metric does
            if low < high:
                chart.segment((x, low), (x, high), "interval", row)
            tip = f"{column}: {words.score(mean, metric)} {words.interval(half, metric)}".strip()
            marks.append(Mark(x, chart.y.place(mean), tip))
        chart.marks(marks, row, symbol, row)
        chart.entry(row, row, "", symbol)
    return chart.file(facet.heading or words.metric_name(metric))


def _known(half: float) -> float:
    return 0.0 if math.isnan(half) else half
