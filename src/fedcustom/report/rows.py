"""Columns and cells of the page's comparison table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from . import formatting as words
from .groups import Group, best_group, lower_is_better, measured_on_clients, trivial_metric
from .plots import colour
from .tables import comparison_frame

SECTION_NAMES = {
    "centralised": "Centralised: all data in one place",
    "federated": "Federated: data stays with its owners",
    "local": "Local: each client alone, mean over clients",
}


@dataclass(frozen=True, slots=True)
class Column:
    """One column: the frame's ``key``, its heading and a ``note`` to that, and the heading ``above`` several.

    ``metric`` is set where the column is shown for the chosen metric only.
    """

    key: str
    heading: str
    note: str
    above: str
    show: Callable[[float], str]
    lower_is_better: bool = True
    measured: str = ""
    metric: str = ""


@dataclass(frozen=True, slots=True)
class TableCell:
    """What stands in one cell: a value, its interval below it, and whether it is the best of its column.
    ``value`` and ``half`` are the same with all digits, empty where there is none.
    """

    text: str
    interval: str = ""
    best: bool = False
    metric: str = ""
    value: str = ""
    half: str = ""


@dataclass(frozen=True, slots=True)
class TableRow:
    """One group."""

    name: str
    label: str
    note: str
    paint: str
    cells: list[TableCell]


@dataclass(frozen=True, slots=True)
class TableSection:
    """The groups of one baseline."""

    heading: str
    rows: list[TableRow]


def _metric_column(metric: str, prefix: str, heading: str, above: str, chosen: str = "") -> Column:
    return Column(
        key=f"{prefix}{metric}",
        heading=heading,
        note="",
        above=above,
        show=lambda value: words.score(value, metric),
        lower_is_better=lower_is_better(metric),
        measured=metric,
        metric=chosen,
    )


def comparison_columns(groups: Sequence[Group], metrics: Sequence[str]) -> list[Column]:
    """The columns in their order.

    Those over clients are there once a metric; where clients were not scored by it, they show another metric.
    """
    by_client = [metric for metric in metrics if measured_on_clients(groups, metric)]
    columns = [
        _metric_column(metric, "", words.capitalised(words.metric_name(metric)), "Test split")
        for metric in metrics
    ]
    for metric in metrics if by_client else []:
        shown = metric if metric in by_client else by_client[0]
        above = "Over clients" if shown == metric else f"Over clients ({words.metric_name(shown)})"
        columns.append(_metric_column(shown, "client_mean_", "Mean", above, metric))
        columns.append(_metric_column(shown, "worst_client_", "Worst", above, metric))
    searched = any(not math.isnan(run.summary.bytes.down_per_query) for g in groups for run in g.runs)
    queries = [
        Column("bytes_up_per_query", "Up", "a query", "Bytes sent", words.byte_count),
        Column("bytes_down_per_query", "Down", "a query", "Bytes sent", words.byte_count),
    ]
    return [
        *columns,
        Column("trainable_parameters", "Method", "", "Parameters", words.count),
        Column("head_parameters", "Head", "", "Parameters", words.count),
        Column("bytes_up_per_client_round", "Up", "client, round", "Bytes sent", words.byte_count),
        Column("bytes_down_per_client_round", "Down", "client, round", "Bytes sent", words.byte_count),
        Column("bytes_up_total", "Up", "in total", "Bytes sent", words.byte_count),
        Column("bytes_down_total", "Down", "in total", "Bytes sent", words.byte_count),
        *(queries if searched else []),
        Column("seconds", "Time", "", "A run", words.duration),
        Column("peak_memory_bytes", "Memory", "peak", "A run", words.byte_count),
    ]


def _best_texts(frame: pd.DataFrame, column: Column, rows: Sequence[bool]) -> str:
    """How the best value of a column is written; empty where all compared rows are written alike."""
    values = frame.loc[list(rows), column.key].dropna()
    texts = {column.show(float(value)) for value in values}
    if len(texts) < 2:
        return ""
    return column.show(float(values.min() if column.lower_is_better else values.max()))


def comparison_sections(groups: Sequence[Group], columns: Sequence[Column]) -> list[TableSection]:
    """The rows by baseline, and last the base model zero-shot and few-shot, the untuned model and copies of
    the prompts. Best is the best federated value, where any is federated.
    """
    frame = comparison_frame(groups)
    metrics = [column.measured for column in columns if column.measured]
    compared_baseline = best_group(groups, metrics[0]).baseline
    compared = [group.baseline == compared_baseline and not group.own_title for group in groups]
    best = {column.key: _best_texts(frame, column, compared) for column in columns}
    sections: dict[str, TableSection] = {}
    references = list[TableRow]()
    for place, group in enumerate(groups):
        values = frame.iloc[place]
        cells = []
        for column in columns:
            text = column.show(float(values[column.key]))
            half = float(values[f"{column.key}_interval"]) if column.measured else math.nan
            is_best = compared[place] and bool(best[column.key]) and text == best[column.key]
            interval = words.interval(half, column.measured)
            digits = (_digits(float(values[column.key])), _digits(half))
            cells.append(TableCell(text, interval, is_best, column.metric, *digits))
        seeds, rounds = words.plural(len(group.runs), "seed"), words.plural(int(values["rounds"]), "round")
        note = f"{seeds}, {'nothing is trained' if group.own_title else rounds}"
        paint, name = colour(group.method, groups), words.capitalised(group.method_name)
        row = TableRow(name, group.label, note, paint, cells)
        if group.own_title:
            references.append(row)
            continue
        section = sections.setdefault(group.baseline, TableSection(SECTION_NAMES[group.baseline], []))
        section.rows.append(row)
    references.append(_reference(groups, columns, "untuned", "Untuned model", "before any training"))
    if any(run.summary.copy for group in groups for run in group.runs):
        references.append(_reference(groups, columns, "copy", "Copy", "the prompt as the output"))
    return [*sections.values(), TableSection("Reference", references)]


def _reference(
    groups: Sequence[Group],
    columns: Sequence[Column],
    kind: Literal["copy", "untuned"],
    name: str,
    note: str,
) -> TableRow:
    cells = []
    for column in columns:
        if column.measured and not column.metric:
            value = trivial_metric(groups, kind, column.measured)
            cells.append(TableCell(column.show(value), value=_digits(value)))
        else:
            cells.append(TableCell("", metric=column.metric))
    return TableRow(name, kind, note, "", cells)


def _digits(value: float) -> str:
    """A number with all its digits, empty where it is none."""
    return "" if math.isnan(value) else repr(value)
