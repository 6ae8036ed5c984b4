"""The comparison of methods: as a data frame, and for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.table import Table
from rich.text import Text

from . import formatting as words
from .baselines import degenerate, left_out, partly_generated, truncated, unbeaten
from .groups import Group, group_runs, mean_and_interval, measured_on_clients, metric_names, trivial_metric
from .read import Run, read_runs


def _costs(run: Run) -> dict[str, float]:
    result = run.summary
    return {
        "trainable_parameters": result.trainable_parameters,
        "head_parameters": result.head_parameters,
        "bytes_up_per_client_round": result.bytes.up_per_client_round,
        "bytes_down_per_client_round": result.bytes.down_per_client_round,
        "bytes_up_total": result.bytes.up_total,
        "bytes_down_total": result.bytes.down_total,
        "bytes_up_per_query": result.bytes.up_per_query,
        "bytes_down_per_query": result.bytes.down_per_query,
        "seconds": result.seconds.get("total", math.nan),
        "peak_memory_bytes": result.peak_memory_bytes,
    }


def comparison_frame(groups: Sequence[Group]) -> pd.DataFrame:
    """The rows of :func:`comparison` for groups that are at hand, in their order."""
    metrics = metric_names([run for group in groups for run in group.runs])
    records = []
    copied = any(run.summary.copy for group in groups for run in group.runs)
    for group in groups:
        record: dict[str, object] = {
            "method": group.method,
            "baseline": group.baseline,
            "variant": ", ".join(filter(None, (group.own_title, group.variant))),
            "seeds": len(group.runs),
            "rounds": max(run.summary.rounds for run in group.runs),
        }
        results = [run.summary for run in group.runs]
        for metric in metrics:
            for prefix, scores in (
                ("", [result.metrics for result in results]),
                ("client_mean_", [result.client_mean for result in results]),
                ("worst_client_", [result.worst_client for result in results]),
                ("untuned_", [result.untuned for result in results]),
                *([("copy_", [result.copy for result in results])] if copied else []),
            ):
                mean, half = mean_and_interval(values.get(metric, math.nan) for values in scores)
                record[f"{prefix}{metric}"] = mean
                record[f"{prefix}{metric}_interval"] = half
        costs = pd.DataFrame([_costs(run) for run in group.runs], dtype=float)
        record.update({str(name): float(value) for name, value in costs.mean(skipna=False).items()})
        records.append(record)
    return pd.DataFrame(records)


def comparison(directories: Sequence[Path]) -> pd.DataFrame:
    """One row for each method and baseline: means over seeds, and 95% intervals.

    Columns: ``method``, ``baseline``, ``variant`` (the settings in which groups of one method and baseline
    differ, usually empty; of method ``untuned`` ``zero-shot``, or ``few-shot`` and how many), ``seeds``,
    ``rounds``; for each metric its mean on the test split, and with the prefixes ``client_mean_``,
    ``worst_client_``, ``untuned_`` and ``copy_`` the same over clients, for the untuned model and for copies
    of the prompts (generation alone), each followed by ``..._interval``, half the width of its 95% interval
    (Student's t; NaN for a single seed); then means of ``trainable_parameters``, ``head_parameters``,
    ``bytes_up_per_client_round``, ``bytes_down_per_client_round``, ``bytes_up_total``, ``bytes_down_total``,
    ``bytes_up_per_query`` and ``bytes_down_per_query`` (NaN for methods that search nothing), ``seconds`` and
    ``peak_memory_bytes``. Rows are sorted: centralised, federated, local; each by the first metric.

    Raises:
        RunError: a folder holds no finished run, or a file in it is malformed.
    """
    return comparison_frame(group_runs(read_runs(directories).finished))


def _with_interval(row: pd.Series, metric: str) -> str:
    half = words.interval(row[f"{metric}_interval"], metric)
    return f"{words.score(row[metric], metric)} {half}".strip()


def comparison_table(directories: Sequence[Path]) -> Table:
    """The comparison for a terminal, at most about 110 columns wide: means over seeds, and costs; last the
    untuned model and copies of the prompts. Below it stand the methods that do not beat a trivial baseline,
    and those whose outputs are degenerate, and how many inputs and targets were cut.

    Raises:
        RunError: a folder holds no finished run, or a file in it is malformed.
    """
    groups = group_runs(read_runs(directories).finished)
    runs = [run for group in groups for run in group.runs]
    metrics = metric_names(runs)
    frame = comparison_frame(groups)
    models, data = (
        ", ".join(sorted(names))
        for names in ({run.summary.model for run in runs}, {run.summary.data for run in runs})
    )
    searched = bool(frame["bytes_down_per_query"].notna().any())
    caption = ["± half of the 95% interval over seeds", "sent: up and down, all clients and rounds"]
    if searched:
        caption.append("a query: bytes up and down, all clients that are asked")
    below = ["; ".join(caption)]
    if "calibration_error" in metrics[:4]:
        below.append("ECE: expected calibration error, lower is better")
    below += [
        *unbeaten(groups, metrics[0]),
        *degenerate(groups),
        *partly_generated(groups),
        *truncated(groups),
        *left_out(groups),
    ]
    table = Table(
        title=Text(f"{models} on {data}, test split, mean over seeds"),
        caption=Text("\n".join(below)),
        box=None,
        padding=(0, 2, 0, 0),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("method", overflow="fold", max_width=30)
    worst = next((metric for metric in metrics if measured_on_clients(groups, metric)), metrics[0])
    worst_heading = "worst" if worst == metrics[0] else f"worst {words.metric_name(worst)}"
    costs = ("seeds", "params", "sent", *(["a query"] if searched else []), "time", "memory")
    shown = metrics[: 5 if "perplexity" in metrics[4:5] else 4]
    for heading in (*map(words.metric_name, shown), worst_heading, *costs):
        table.add_column(heading, justify="right", no_wrap=True)
    for group, (_, row) in zip(groups, frame.iterrows(), strict=True):
        sent = row["bytes_up_total"] + row["bytes_down_total"]
        cells = [
            _with_interval(row, metrics[0]),
            *(words.score(row[metric], metric) for metric in shown[1:]),
            words.score(row[f"worst_client_{worst}"], worst),
            str(row["seeds"]),
            words.count(row["trainable_parameters"]),
            words.byte_count(sent),
            *(
                [words.byte_count(row["bytes_up_per_query"] + row["bytes_down_per_query"])]
                if searched
                else []
            ),
            words.duration(row["seconds"]),
            words.byte_count(row["peak_memory_bytes"]),
        ]
        name = f"{group.baseline} {group.method}" + (f" ({group.variant})" if group.variant else "")
        table.add_row(Text(group.label if group.own_title else name), *map(Text, cells))
    for kind in ("untuned", "copy"):
        values = [trivial_metric(groups, kind, metric) for metric in shown]
        if not all(map(math.isnan, values)):
            scores = [words.score(value, metric) for value, metric in zip(values, shown, strict=True)]
            table.add_row(kind, *scores, *[""] * (len(table.columns) - 1 - len(scores)))
    return table
