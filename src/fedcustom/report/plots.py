"""The charts of a report: quality by round and by bytes, and client by client."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from markupsafe import Markup

from . import formatting as words
from .axes import Axis, Tick, limits, linear, logarithmic, value_range, whole
from .groups import Group, client_scores, history
from .methods import has_colours, registered
from .svg import MARKS, Chart, Mark

SYMBOLS = tuple(name for name in MARKS if name != "hit")
"""Symbols in the order in which the variants of one method take them."""
OTHER_COLOURS = 3
DASHES = {"federated": "solid", "centralised": "dash", "local": "dot"}
MOST_MARKS = 40
"""Points up to which a curve shows its marks."""
MOST_HITS = 60
"""Points of a curve that answer to the pointer."""
BOX_FROM = 10
"""Fewer clients than this are shown as points without a box."""
MOST_POINTS, ENDS = 400, 50
"""Of more clients than this, only so many at each end are shown as points."""
ROW = 62
LONGEST_NAME = 18
GOLDEN = (math.sqrt(5) - 1) / 2

Plots = dict[str, dict[str, Markup]]
"""Charts by name and metric."""


def colour(method: str, groups: Sequence[Group]) -> str:
    """The name of a method's colour: its own, or one of a few others in palette.css where it has none."""
    if has_colours(method):
        return f"method-{method}"
    unknown = sorted({group.method for group in groups if not has_colours(group.method)})
    return f"method-other-{unknown.index(method) % OTHER_COLOURS}"


def _place_among_variants(group: Group, groups: Sequence[Group]) -> int:
    twins = [other for other in groups if (other.method, other.baseline) == (group.method, group.baseline)]
    return twins.index(group)


def _symbol(group: Group, groups: Sequence[Group]) -> str:
    found = registered(group.method)
    own = found.symbol if found is not None else None
    place = SYMBOLS.index(own) if own in SYMBOLS else 0
    return SYMBOLS[(place + _place_among_variants(group, groups)) % len(SYMBOLS)]


def _metric_axis(curves: Sequence[pd.DataFrame], metric: str) -> Axis:
    together = pd.concat([curve[["mean", "interval"]] for curve in curves])
    return linear(*value_range(list(together["mean"]), metric, list(together["interval"])))


def _band(chart: Chart, curve: pd.DataFrame, metric: str, paint: str, along: str = "round") -> None:
    """The 95% interval around a curve, where two points at least have one."""
    certain = curve.dropna()
    if len(certain) > 1:
        low = (certain["mean"] - certain["interval"]).clip(*limits(metric))
        high = (certain["mean"] + certain["interval"]).clip(*limits(metric))
        chart.band(list(certain[along]), list(low), list(high), paint)


def _curve(
    chart: Chart,
    points: Sequence[tuple[float, float]],
    tips: Sequence[str],
    group: Group,
    groups: Sequence[Group],
) -> None:
    """A group's curve with its marks; of many points, some answer to the pointer, the last one among them."""
    paint, symbol = colour(group.method, groups), _symbol(group, groups)
    chart.line(
        points, paint, DASHES[group.baseline], max(0.4, 1 - 0.25 * _place_among_variants(group, groups))
    )
    step = max(1, math.ceil(len(points) / MOST_HITS))
    shown = [n for n in range(len(points)) if (len(points) - 1 - n) % step == 0]
    marks = [Mark(chart.x.place(points[n][0]), chart.y.place(points[n][1]), tips[n]) for n in shown]
    drawn = symbol if len(points) <= MOST_MARKS else "hit"
    chart.marks(marks, paint, drawn, words.capitalised(group.label))


def _entry(chart: Chart, group: Group, groups: Sequence[Group]) -> None:
    chart.entry(group.label, colour(group.method, groups), DASHES[group.baseline], _symbol(group, groups))


def by_round(groups: Sequence[Group], metric: str) -> Markup | None:
    """Development quality by round, mean and 95% interval over seeds; None where no round was evaluated."""
    curves = [history(group, metric).dropna(subset="mean") for group in groups]
    if all(curve.empty for curve in curves):
        return None
    last = max(int(curve["round"].max()) for curve in curves if not curve.empty)
    name = words.capitalised(words.metric_name(metric))
    chart = Chart(whole(last), _metric_axis(curves, metric), "Round", name, grid="y")
    for group, curve in zip(groups, curves, strict=True):
        _band(chart, curve, metric, colour(group.method, groups))
    for group, curve in zip(groups, curves, strict=True):
        if curve.empty:
            continue
        tips = [
            f"round {int(number)}: {words.score(mean, metric)} {words.interval(half, metric)}".strip()
            for number, mean, half in zip(curve["round"], curve["mean"], curve["interval"], strict=True)
        ]
        _curve(chart, list(zip(curve["round"], curve["mean"], strict=True)), tips, group, groups)
        _entry(chart, group, groups)
    return chart.html()


def _at_best_round(group: Group, metric: str) -> float:
    values = [
        line.development[metric]
        for run in group.runs
        for line in run.history
        if line.round == run.summary.best_round and metric in line.development
    ]
    return sum(values) / len(values) if values else math.nan


def by_bytes(groups: Sequence[Group], metric: str) -> Markup | None:
    """Development quality against bytes sent so far; None where no run sent anything.

    Groups that send nothing are level lines, at the quality of their best round.
    """
    curves = {
        group.label: history(group, metric).query("bytes > 0").dropna(subset="mean") for group in groups
    }
    sent = pd.concat([curve["bytes"] for curve in curves.values()])
    if sent.empty:
        return None
    least, most = float(sent.min()), float(sent.max())
    shown = []
    for group in groups:
        if curves[group.label].empty:
            level = pd.DataFrame(
                {"bytes": [least, most], "mean": _at_best_round(group, metric), "interval": math.nan}
            )
            curves[group.label] = level.dropna(subset="mean")
        shown.append(curves[group.label])
    title, x = "Bytes sent so far", linear(0, 1.04 * most, words.byte_count, most=7)
    if most >= 100 * least:
        title, x = f"{title} (log scale)", logarithmic(least, most, words.byte_count)
    y_title = words.capitalised(words.metric_name(metric))
    chart = Chart(x, _metric_axis(shown, metric), title, y_title)
    for group, curve in zip(groups, shown, strict=True):
        _band(chart, curve, metric, colour(group.method, groups), along="bytes")
    for group, curve in zip(groups, shown, strict=True):
        if curve.empty:
            continue
        sends = "round" in curve
        tips = [
            f"{words.score(mean, metric)}, "
            + (words.byte_count(amount) if sends else "best round, sends nothing")
            for amount, mean in zip(curve["bytes"], curve["mean"], strict=True)
        ]
        points = list(zip(curve["bytes"], curve["mean"], strict=True))
        _curve(chart, points, tips, group, groups)
        _entry(chart, group, groups)
    return chart.html()


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 1] + "…"


def _row_name(group: Group) -> str:
    parts = [
        words.capitalised(group.plain_name),
        *filter(None, group.variant.split(", ")[:1]),
        group.baseline,
    ]
    return "\n".join(map(_short, parts))


def by_client(groups: Sequence[Group], metric: str) -> Markup | None:
    """Each client's score on its own test part, one row a group, and a bar at the mean over clients.

    With many clients only those at the ends are points; the box has the middle half of all of them, and the
    line through it the middle nine tenths.
    """
    frames = [(group, client_scores(group, metric).dropna(subset="score")) for group in groups]
    frames = [(group, frame) for group, frame in frames if not frame.empty]
    if not frames:
        return None
    scores = [float(score) for _, frame in frames for score in frame["score"]]
    x = linear(*value_range(scores, metric))
    ticks = (Tick(1 - (row + 0.5) / len(frames), _row_name(group)) for row, (group, _) in enumerate(frames))
    rows = Axis(0, len(frames), tuple(ticks))
    title = words.capitalised(words.metric_name(metric))
    chart = Chart(x, rows, title, height=ROW * len(frames), gutter="names", grid="x")
    for row, (group, frame) in enumerate(frames):
        _strip(chart, 1 - (row + 0.5) / len(frames), 1 / len(frames), frame, metric, group, groups)
    return chart.html()


def _strip(
    chart: Chart,
    y: float,
    width: float,
    frame: pd.DataFrame,
    metric: str,
    group: Group,
    groups: Sequence[Group],
) -> None:
    """One row: clients as points, spread over the row so that equal ones are told apart."""
    paint, name = colour(group.method, groups), words.capitalised(group.label)
    ordered = frame.sort_values("score", kind="stable")
    boxed, mean = len(frame) >= BOX_FROM, float(frame["score"].mean())
    if boxed:
        ends = [chart.x.place(float(end)) for end in ordered["score"].quantile([0.05, 0.25, 0.75, 0.95])]
        chart.segment((ends[0], y), (ends[3], y), "whisker", paint)
        chart.box(ends[1], ends[2], y - 0.3 * width, y + 0.3 * width, paint, "box")
    shown = ordered
    if len(ordered) > MOST_POINTS:
        shown = pd.concat([ordered.head(ENDS), ordered.tail(ENDS)])
    spread = (0.5 if boxed else 0.3) * width
    marks = [
        Mark(
            chart.x.place(float(score)),
            y + spread * ((number * GOLDEN) % 1 - 0.5),
            f"{client}: {words.score(score, metric)}"
            + ("" if math.isnan(examples) else f" ({words.plural(round(examples), 'test example')})"),
        )
        for number, (client, score, examples) in enumerate(shown.itertuples(index=False))
    ]
    chart.marks(marks, paint, _symbol(group, groups), name, "faint")
    place = chart.x.place(mean)
    tip = f"{name}: mean over {words.plural(len(frame), 'client')} {words.score(mean, metric)}"
    chart.segment((place, y - 0.32 * width), (place, y + 0.32 * width), "mean", tip=tip)


def figures(groups: Sequence[Group], metrics: Sequence[str]) -> Plots:
    """All charts that depend on a metric: plot, then metric. A plot without any chart is missing."""
    plots: Mapping[str, Any] = {"rounds": by_round, "bytes": by_bytes, "clients": by_client}
    drawn = {
        name: {metric: chart for metric in metrics if (chart := draw(groups, metric)) is not None}
        for name, draw in plots.items()
    }
    return {name: by_metric for name, by_metric in drawn.items() if by_metric}
