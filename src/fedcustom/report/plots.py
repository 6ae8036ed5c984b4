"""Figures, without colours: ``meta`` names a trace's role and its colour in palette.css; page.js paints it.

Names that come from files are escaped, since plotly reads a part of HTML in texts.
"""

from __future__ import annotations

import html
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from . import words
from .groups import PERCENT_METRICS, Group, client_scores, history, lower_is_better

METHODS = (
    "prefix",
    "lora",
    "soft_prompt",
    "full",
    "adapter",
    "ia3",
    "bitfit",
    "prompt_engineering",
    "distillation",
    "retrieval",
)
OTHER_COLOURS = 3
SYMBOLS = (
    "circle",
    "square",
    "diamond",
    "triangle-up",
    "triangle-down",
    "pentagon",
    "star",
    "cross",
    "x",
    "hexagram",
)
DASHES = {"federated": "solid", "centralised": "dash", "local": "dot"}
BOX_FROM = 10
"""Fewer clients than this are shown as points without a box."""
LARGEST_CONFUSION = 30
LONGEST_TICK = 18

Figures = dict[str, dict[str, go.Figure]]


def colour(method: str, groups: Sequence[Group]) -> str:
    """The name of a method's colour in palette.css: its own, or for unknown methods one of a few others."""
    if method in METHODS:
        return f"method-{method}"
    unknown = sorted({group.method for group in groups} - set(METHODS))
    return f"method-other-{unknown.index(method) % OTHER_COLOURS}"


def _place_among_variants(group: Group, groups: Sequence[Group]) -> int:
    twins = [other for other in groups if (other.method, other.baseline) == (group.method, group.baseline)]
    return twins.index(group)


def _symbol(group: Group, groups: Sequence[Group]) -> str:
    place = METHODS.index(group.method) if group.method in METHODS else len(METHODS)
    return SYMBOLS[(place + _place_among_variants(group, groups)) % len(SYMBOLS)]


def _marker(group: Group, groups: Sequence[Group], size: int) -> dict[str, Any]:
    symbol = _symbol(group, groups)
    return {"symbol": symbol, "size": size + 2 if symbol.startswith("triangle") else size}


def _escaped(text: str) -> str:
    return html.escape(text, quote=False)


def _figure(traces: Sequence[Any], **layout: Any) -> go.Figure:
    figure = go.Figure(traces)
    figure.update_layout(template=None, dragmode=False, **layout)
    figure.update_xaxes(fixedrange=True)
    figure.update_yaxes(fixedrange=True)
    return figure


def _limits(metric: str) -> tuple[float, float]:
    if lower_is_better(metric):
        return 0.0, math.inf
    return 0.0, 100.0 if metric in PERCENT_METRICS else 1.0


def _y_axis(curves: Sequence[pd.DataFrame], metric: str) -> dict[str, Any]:
    """An axis that shows all means; a wide band may leave it, since with two seeds it would flatten every
    curve.
    """
    means = pd.concat([curve["mean"] for curve in curves])
    halves = pd.concat([curve["interval"] for curve in curves]).fillna(0.0)
    low, high = float(means.min()), float(means.max())
    span = (high - low) or abs(high) or 1.0
    floor, ceiling = _limits(metric)
    bottom = max(float((means - halves).min()), low - 0.25 * span, floor) - 0.04 * span
    top = min(float((means + halves).max()), high + 0.25 * span, ceiling) + 0.04 * span
    name = words.capitalised(words.metric_name(metric))
    return {"title": {"text": name}, "range": [bottom, top], "zeroline": False}


def _band(x: pd.Series, curve: pd.DataFrame, metric: str, name: str, paint: str) -> go.Scatter:
    floor, ceiling = _limits(metric)
    high = (curve["mean"] + curve["interval"]).clip(floor, ceiling)
    low = (curve["mean"] - curve["interval"]).clip(floor, ceiling)
    return go.Scatter(
        x=[*x, *x[::-1]],
        y=[*high, *low[::-1]],
        fill="toself",
        mode="lines",
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
        legendgroup=name,
        meta={"role": "band", "colour": paint},
    )


def _line(x: Any, y: Any, group: Group, groups: Sequence[Group], **more: Any) -> go.Scatter:
    name = _escaped(group.label).replace(" (", "<br>(")
    return go.Scatter(
        **{
            "x": list(x),
            "y": list(y),
            "name": name,
            "legendgroup": _escaped(group.label),
            "mode": "lines+markers" if len(x) <= 40 else "lines",
            "line": {"width": 2, "dash": DASHES[group.baseline]},
            "marker": _marker(group, groups, 6),
            "cliponaxis": False,
            "opacity": max(0.4, 1 - 0.25 * _place_among_variants(group, groups)),
            "meta": {"role": "line", "colour": colour(group.method, groups)},
        }
        | more
    )


def by_round(groups: Sequence[Group], metric: str) -> go.Figure | None:
    """Development quality by round, mean and 95% interval over seeds; None where no round was evaluated."""
    curves = [history(group, metric) for group in groups]
    if all(curve.empty for curve in curves):
        return None
    bands, lines = [], []
    for group, curve in zip(groups, curves, strict=True):
        certain = curve.dropna()
        if len(certain) > 1:
            paint = colour(group.method, groups)
            bands.append(_band(certain["round"], certain, metric, _escaped(group.label), paint))
        halves = [words.interval(half, metric) for half in curve["interval"]]
        template = f"%{{y:.{words.decimals(metric)}f}} %{{customdata}}"
        if not curve.empty:
            lines.append(
                _line(curve["round"], curve["mean"], group, groups, customdata=halves, hovertemplate=template)
            )
    return _figure(
        [*bands, *lines],
        xaxis={
            "title": {"text": "Round"},
            "zeroline": False,
            "rangemode": "tozero",
            "unifiedhovertitle": {"text": "Round %{x:d}"},
            "dtick": 1 if max(curve["round"].max() for curve in curves if not curve.empty) <= 12 else None,
        },
        yaxis=_y_axis([curve for curve in curves if not curve.empty], metric),
        hovermode="x unified",
    )


def _at_best_round(group: Group, metric: str) -> float:
    values = [
        line.development[metric]
        for run in group.runs
        for line in run.history
        if line.round == run.summary.best_round and metric in line.development
    ]
    return sum(values) / len(values) if values else math.nan


def by_bytes(groups: Sequence[Group], metric: str) -> go.Figure | None:
    """Development quality against bytes sent so far; None where no run sent anything.

    Groups that send nothing are level lines, at the quality of their best round.
    """
    curves = {group.label: history(group, metric).query("bytes > 0") for group in groups}
    sent = pd.concat([curve["bytes"] for curve in curves.values()])
    if sent.empty:
        return None
    least, most = float(sent.min()), float(sent.max())
    logarithmic = most >= 100 * least
    traces, shown = [], []
    for group in groups:
        curve = curves[group.label]
        if curve.empty:
            level = _at_best_round(group, metric)
            if math.isnan(level):
                continue
            curve = pd.DataFrame({"bytes": [least, most], "mean": level, "interval": math.nan})
            note, mode = "best round, sends nothing", "lines"
        else:
            note, mode = "%{x:.3s}B", "lines+markers" if len(curve) <= 40 else "lines"
        template = f"{_escaped(group.label)}<br>%{{y:.{words.decimals(metric)}f}}, {note}<extra></extra>"
        traces.append(_line(curve["bytes"], curve["mean"], group, groups, mode=mode, hovertemplate=template))
        shown.append(curve)
    title = "Bytes sent so far" + (" (log scale)" if logarithmic else "")
    axis: dict[str, Any] = {
        "title": {"text": title},
        "tickformat": "~s",
        "ticksuffix": "B",
        "zeroline": False,
    }
    if logarithmic:
        axis |= {"type": "log", "dtick": 1}
    return _figure(traces, xaxis=axis, yaxis=_y_axis(shown, metric), hovermode="closest")


def _tick(text: str) -> str:
    return _escaped(text if len(text) <= LONGEST_TICK else text[: LONGEST_TICK - 1] + "…")


def _row_label(group: Group) -> str:
    parts = [words.capitalised(group.plain_name), *filter(None, group.variant.split(", ")[:2])]
    return "<br>".join([*map(_tick, parts), f"<i>{group.baseline}</i>"])


def by_client(groups: Sequence[Group], metric: str) -> go.Figure | None:
    """Each client's score on its own test part, one row a group, and a bar at the mean over clients."""
    traces: list[Any] = []
    rows: list[str] = []
    for group in groups:
        frame = client_scores(group, metric).dropna(subset="score")
        if frame.empty:
            continue
        row = len(rows)
        rows.append(_row_label(group))
        paint = colour(group.method, groups)
        texts = [
            f"{_escaped(str(client))}: {words.score(score, metric)}"
            + ("" if math.isnan(examples) else f" ({words.plural(round(examples), 'test example')})")
            for client, score, examples in frame.itertuples(index=False)
        ]
        boxed = len(frame) >= BOX_FROM
        traces += [
            go.Box(
                x=list(frame["score"]),
                y=[row] * len(frame),
                orientation="h",
                boxpoints="all",
                jitter=0.6 if boxed else 0.3,
                pointpos=0,
                line={"width": 1 if boxed else 0},
                marker=_marker(group, groups, 5 if boxed else 7) | {"opacity": 0.75},
                hoveron="points",
                text=texts,
                hovertemplate="%{text}<extra></extra>",
                meta={"role": "box" if boxed else "strip", "colour": paint},
            ),
            go.Scatter(
                x=[float(frame["score"].mean())],
                y=[row],
                mode="markers",
                marker={"symbol": "line-ns", "size": 30, "line": {"width": 2.5}},
                hovertemplate=f"mean over {words.plural(len(frame), 'client')}: "
                f"%{{x:.{words.decimals(metric)}f}}<extra></extra>",
                meta={"role": "mean", "colour": paint},
            ),
        ]
    if not traces:
        return None
    return _figure(
        traces,
        xaxis={"title": {"text": words.capitalised(words.metric_name(metric))}, "zeroline": False},
        yaxis={
            "tickvals": list(range(len(rows))),
            "ticktext": rows,
            "range": [len(rows) - 0.5, -0.5],
            "zeroline": False,
        },
        showlegend=False,
        height=90 + 62 * len(rows),
        hovermode="closest",
    )


def confusion(pairs: Counter[tuple[str, str]], order: Sequence[str], paint: str) -> go.Figure:
    """How often each label (row) was predicted as each label (column); colours are shares of a row.

    Labels stand in the given order, and others behind them by name.

    Beyond thirty labels, the rarest are taken together as "other labels".
    """
    frequency: Counter[str] = Counter()
    for (label, predicted), number in pairs.items():
        frequency[label] += number
        frequency[predicted] += 0
    common = {label for label, _ in frequency.most_common(LARGEST_CONFUSION)}
    kept = [label for label in dict.fromkeys([*order, *sorted(frequency)]) if label in common]
    names = {label: label if label in kept else "other labels" for label in frequency}
    labels = list(dict.fromkeys(kept + (["other labels"] if len(frequency) > len(kept) else [])))
    counts = np.zeros((len(labels), len(labels)), dtype=int)
    for (label, predicted), number in pairs.items():
        counts[labels.index(names[label]), labels.index(names[predicted])] += number
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    ticks = [_tick(label) for label in labels]
    hover = [
        [
            f"{_escaped(label)} predicted as {_escaped(predicted)}: {number}"
            for predicted, number in zip(labels, row, strict=True)
        ]
        for label, row in zip(labels, counts, strict=True)
    ]
    positions = list(range(len(labels)))
    return _figure(
        go.Heatmap(
            z=shares.tolist(),
            text=counts.tolist(),
            customdata=hover,
            texttemplate="%{text}" if len(labels) <= 15 else None,
            hovertemplate="%{customdata}<extra></extra>",
            zmin=0,
            zmax=1,
            xgap=1,
            ygap=1,
            showscale=False,
            meta={"role": "heat", "colour": paint},
        ),
        xaxis={
            "title": {"text": "Predicted"},
            "tickvals": positions,
            "ticktext": ticks,
            "showgrid": False,
            "zeroline": False,
        },
        yaxis={
            "title": {"text": "Label"},
            "tickvals": positions,
            "ticktext": ticks,
            "autorange": "reversed",
            "showgrid": False,
            "zeroline": False,
        },
        height=max(320, 150 + 26 * len(labels)),
    )


def figures(groups: Sequence[Group], metrics: Sequence[str]) -> Figures:
    """All figures that depend on a metric: plot, then metric. A plot without any figure is missing."""
    plots: Mapping[str, Any] = {"rounds": by_round, "bytes": by_bytes, "clients": by_client}
    drawn = {
        name: {metric: figure for metric in metrics if (figure := draw(groups, metric)) is not None}
        for name, draw in plots.items()
    }
    return {name: by_metric for name, by_metric in drawn.items() if by_metric}


def as_json(plots: Figures) -> str:
    """The figures as JSON that may stand inside a ``script`` element: ``<``, ``>`` and ``&`` are written
    as escapes.
    """
    plain = {
        name: {key: json.loads(figure.to_json()) for key, figure in by_key.items()}
        for name, by_key in plots.items()
    }
    text = json.dumps(plain, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
