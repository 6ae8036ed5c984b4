"""Tables of an experiment, from its results alone: means over seeds with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..evaluation.metrics import LOWER_IS_BETTER
from ..report import formatting as words
from ..report.groups import mean_and_interval
from ..report.methods import own_title
from ..report.read import flatten
from .baselines import deciding_axes, reference_rows
from .results import Result, reached
from .settings import BASELINE, ExperimentSettings, ReportSettings, matches

SCORE = "score"
"""The column of a table whose rows are all axes."""

Value = Callable[[Result], float]
"""A figure of one result."""


@dataclass(frozen=True)
class Replicates:
    """The results at one combination of points, which differ in their seeds alone."""

    points: dict[str, str]
    results: list[Result]

    def name(self, axes: Sequence[str]) -> str:
        """What a table calls it, by its points on these axes as far as it has them; ``few-shot`` with the
        number of examples.
        """
        return ", ".join(self._shown(axis) for axis in axes if axis in self.points)

    def _shown(self, axis: str) -> str:
        recipe = flatten(self.results[0].recipe)
        own = own_title(recipe.get("method.name", ""), recipe) if axis == BASELINE else None
        return own or self.points[axis]

    def mean(self, value: Value) -> tuple[float, float]:
        """Mean over seeds, and half the width of the 95 % interval (Student's t; NaN for one seed)."""
        return mean_and_interval(value(result) for result in self.results)


@dataclass(frozen=True)
class Table:
    """A heading, column headings, and rows of texts of which the first names the row."""

    heading: str
    columns: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """As Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join([f"### {self.heading}", "", *(f"| {' | '.join(line)} |" for line in lines)])


@dataclass(frozen=True)
class Facet:
    """What one table of scores and one plot show: a heading, the names of rows and columns, and the results
    in each place, by row and column (missing where there are none).
    """

    heading: str
    rows: list[str]
    columns: list[str]
    places: dict[tuple[str, str], Replicates]


def grouped(results: Sequence[Result]) -> list[Replicates]:
    """Results by their points, seeds in rising order."""
    found: dict[tuple[tuple[str, str], ...], list[Result]] = {}
    for result in sorted(results, key=lambda result: result.seed):
        found.setdefault(tuple(result.points.items()), []).append(result)
    return [Replicates(dict(points), together) for points, together in found.items()]


def facets(settings: ExperimentSettings, groups: Sequence[Replicates]) -> list[Facet]:
    """The results as the file's ``[report]`` lays them out (:meth:`~.settings.ExperimentSettings.layout`), in
    the order of the file.

    Axes that are neither rows nor columns have a facet for each combination of their points. Added baselines
    are rows, in each facet and column that they stand for.
    """
    points = settings.points()
    rows, column = settings.layout()
    rest = [axis for axis in points if axis not in (*rows, column)]
    order = {axis: {point: i for i, point in enumerate(there)} for axis, there in points.items()}
    order[BASELINE] = {name: place for place, name in enumerate(settings.baselines)}
    added = [group for group in groups if settings.is_added(group.points)]
    added.sort(key=lambda group: order[BASELINE].get(group.points[BASELINE], -1))
    cells = [group for group in groups if not settings.is_added(group.points)]
    ordered = sorted(cells, key=lambda group: [order[axis].get(group.points[axis], -1) for axis in points])
    found: dict[str, list[Replicates]] = {}
    for group in ordered:
        heading = ", ".join(f"{axis} {group.points[axis]}" for axis in rest if len(points[axis]) > 1)
        found.setdefault(heading, []).append(group)

    made = []
    for heading, there in found.items():
        columns = [SCORE]
        if column is not None:
            columns = [point for point in points[column] if any(g.points[column] == point for g in there)]
        places = {(group.name(rows), _column(group, column)): group for group in there}
        for group in added:
            if _agree(group.points, there[0].points, rest):
                name = group.name([*rows, BASELINE])
                at = None if column is None else group.points.get(column)
                places |= {(name, point): group for point in columns if at is None or at == point}
        names = list(dict.fromkeys(name for name, _ in places))
        made.append(Facet(heading, names, columns, places))
    return made


def _column(group: Replicates, axis: str | None) -> str:
    return SCORE if axis is None else group.points[axis]


def _agree(points: Mapping[str, str], others: Mapping[str, str], axes: Sequence[str]) -> bool:
    """Whether an added baseline stands beside cells at other points: it does where it has no point."""
    return all(points.get(axis, others[axis]) == others[axis] for axis in axes)


def score_tables(settings: ExperimentSettings, groups: Sequence[Replicates]) -> list[Table]:
    """The score on the test split, the worst client's, and what only some runs have, facet by facet."""
    metric = metric_of(settings.report, groups)
    results = [result for group in groups for result in group.results]
    name = words.metric_name(metric)
    kinds: list[tuple[str, Value]] = [
        (name, lambda result: result.metrics.get(metric, math.nan)),
        (f"worst client's {name}", lambda result: result.worst_client.get(metric, math.nan)),
    ]
    if metric == "accuracy" and any("calibration_error" in result.metrics for result in results):
        kinds.insert(1, ("ECE", lambda result: result.metrics.get("calibration_error", math.nan)))
    if metric == "loss" and all("accuracy" not in result.metrics for result in results):  # of texts
        kinds.insert(1, ("perplexity", lambda result: _exponential(result.metrics.get("loss", math.nan))))
    if any("backdoor" in result.more for result in results):
        kinds.append(("success rate of the backdoor", _extra("backdoor", "success_rate")))
    perturbed = dict.fromkeys(kind for result in results for kind in result.more.get("perturbed", {}))
    kinds += [(f"{name} on test texts with {kind}", _extra("perturbed", kind, metric)) for kind in perturbed]
    tables = []
    for facet in facets(settings, groups):
        for kind, value in kinds:
            heading = f"{facet.heading}: {kind}" if facet.heading else words.capitalised(kind)
            rows = []
            for row in facet.rows:
                there = [facet.places.get((row, column)) for column in facet.columns]
                rows.append([row, *(_shown(group, value, metric) for group in there)])
            if kind == name:
                rows += _references(settings, facet, metric)
            if any(cell != words.MISSING for row in rows for cell in row[1:]):
                tables.append(Table(heading, ["", *facet.columns], rows))
    return tables


def _references(settings: ExperimentSettings, facet: Facet, metric: str) -> list[list[str]]:
    """The rows of a facet for the untuned model and copies of the prompts."""
    axes = [axis for axis in settings.layout()[0] if axis in deciding_axes(settings)]
    places: dict[tuple[str, str], list[Result]] = {}
    for (_, column), group in facet.places.items():
        if not settings.is_added(group.points):
            row = ", ".join(group.points[axis] for axis in axes)
            places.setdefault((column, row), []).extend(group.results)
    return [
        [name, *(words.score(values.get(column, math.nan), metric) for column in facet.columns)]
        for name, values in reference_rows(settings, places, metric)
    ]


def cost_table(settings: ExperimentSettings, groups: Sequence[Replicates]) -> Table:
    """What each combination costs: parameters, bytes, seconds, memory, and rounds and bytes to the wanted
    share of the reference's development score (``[report] reference``); means over seeds.
    """
    share = f"{100 * settings.report.share:g} %"
    columns = [
        "", "seeds", "learning rate", "parameters", "head", "up a client and round", "sent in all", "time",
        "memory", f"rounds to {share}", f"bytes to {share}",
    ]  # fmt: skip
    rows = []
    for group in groups:
        first = group.results[0]
        known_cells = [other for other in groups if not settings.is_added(other.points)]
        added = settings.is_added(group.points)
        target = None if added else target_of(settings.report, group, known_cells)
        found = [reached(result, target) if target is not None else None for result in group.results]
        known = [pair for pair in found if pair is not None]
        missed = len(found) - len(known) if target is not None else 0
        note = f" ({missed} of {len(found)} never)" if missed and known else ""
        empty = words.MISSING if target is None else "never"
        rows.append(
            [
                group.name(list(group.points)),
                str(len(group.results)),
                words.MISSING if first.learning_rate is None else f"{first.learning_rate:g}",
                words.count(first.trainable_parameters),
                words.count(first.head_parameters),
                words.byte_count(group.mean(lambda r: r.bytes["up_per_client_round"])[0]),
                words.byte_count(group.mean(lambda r: r.bytes["up_total"] + r.bytes["down_total"])[0]),
                words.duration(group.mean(lambda r: r.seconds["total"])[0]),
                words.byte_count(max(result.peak_memory_bytes for result in group.results)),
                f"{mean_and_interval(n for n, _ in known)[0]:.0f}{note}" if known else empty,
                words.byte_count(mean_and_interval(sent for _, sent in known)[0]) if known else empty,
            ]
        )
    return Table("Costs", columns, rows)


def target_of(report: ReportSettings, group: Replicates, groups: Sequence[Replicates]) -> float | None:
    """The development score that a group is to reach: the wanted share of its reference's mean over seeds;
    for a metric of which less is better, that mean divided by the share. None without a reference.
    """
    if not report.reference:
        return None
    scores = [
        result.score
        for other in groups
        if matches(report.reference, other.points)
        and all(other.points[axis] == group.points[axis] for axis in report.same)
        for result in other.results
    ]
    if not scores:
        return None
    mean = sum(scores) / len(scores)
    lower = group.results[0].metric in LOWER_IS_BETTER
    return mean / report.share if lower else report.share * mean


def search_table(content: Mapping[str, Any]) -> Table:
    """The trials of a search: each rate with its score on the development split, the mean over the search's
    seeds, the chosen one in bold.
    """
    rows = []
    for name, entry in content["groups"].items():
        cells = []
        for trial in entry["trials"]:
            score = "failed" if trial["score"] is None else f"{trial['score']:.3f}"
            text = f"{trial['rate']:g}: {score}"
            cells.append(f"**{text}**" if trial["rate"] == entry["chosen"] else text)
        rows.append([name, *cells, "yes" if entry["at_edge"] else ""])
    most = max(len(row) for row in rows) - 2
    heading = f"Search of {content['setting']}, development split, mean over the search's seeds"
    return Table(heading, ["", *(f"trial {n}" for n in range(1, most + 1)), "best at the edge"], rows)


def metric_of(report: ReportSettings, groups: Sequence[Replicates]) -> str:
    """The metric of the tables."""
    return report.metric or groups[0].results[0].metric


def _extra(*keys: str) -> Value:
    """What some results have under these keys of ``more``; NaN where it is not."""

    def value(result: Result) -> float:
        found: Any = result.more
        for key in keys:
            found = found.get(key, {})
        return float(found) if found != {} else math.nan

    return value


def _shown(group: Replicates | None, value: Value, metric: str) -> str:
    if group is None:
        return words.MISSING
    mean, half = group.mean(value)
    return f"{words.score(mean, metric)} {words.interval(half, metric)}".strip()


def _exponential(loss: float) -> float:
    """The perplexity of a loss in nats a token; infinite where no float is as large."""
    return math.inf if loss > 700 else math.exp(loss)
