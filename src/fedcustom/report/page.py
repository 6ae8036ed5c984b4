"""One self-contained HTML page from run directories."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..core.files import write_text
from . import formatting as words
from .audits import audit_tables
from .baselines import all_beat, degenerate, left_out, partly_generated, truncated, unbeaten
from .calibration import calibration
from .clients import client_tables, clients_left_out
from .confusion import confusions
from .examples import first_examples
from .groups import Group, best_group, client_counts, group_runs, lower_is_better, metric_names
from .methods import palette
from .plots import BOX_FROM, ENDS, MOST_POINTS, Plots, colour, figures
from .privacy import promises
from .read import Run, Runs, Summary, read_predictions, read_runs
from .rows import TableSection, comparison_columns, comparison_sections
from .svg import definitions
from .timeline import timelines
from .traffic import traffic

STYLES = ("palette.css", "style.css", "print.css")
LONGEST_LOG = 20_000
MOST_VALUES = 4


def _environment(runs: Sequence[Run]) -> list[tuple[str, str]]:
    rows = []
    for key in dict.fromkeys(key for run in runs for key in run.environment):
        values = list(dict.fromkeys(run.environment[key] for run in runs if key in run.environment))
        more = f" and {len(values) - MOST_VALUES} more" if len(values) > MOST_VALUES else ""
        rows.append((key, "; ".join(values[:MOST_VALUES]) + more))
    return rows


def _unscored(runs: Sequence[Run]) -> str:
    """What is said where some clients have no test part."""
    clients, scored = client_counts(runs)
    return f" {scored:,} of {clients:,} clients have one." if scored < clients else ""


def _by_metrics(drawn: dict[str, Markup], metrics: Sequence[str]) -> list[tuple[list[str], Markup]]:
    """A plot's charts, each with the metrics for which it is shown: the first also for those without one."""
    missing = [metric for metric in metrics if metric not in drawn]
    return [
        ([metric, *(missing if place == 0 else [])], chart)
        for place, (metric, chart) in enumerate(drawn.items())
    ]


def _captions(plots: Plots, metrics: Sequence[str]) -> dict[str, dict[str, str]]:
    """What stands below each plot, by metric: which direction is good, or that another metric is shown
    instead.
    """
    captions: dict[str, dict[str, str]] = {}
    for name, drawn in plots.items():
        captions[name] = {}
        for metric in metrics:
            shown = metric if metric in drawn else next(iter(drawn))
            direction = "Lower" if lower_is_better(shown) else "Higher"
            missing = (
                ""
                if shown == metric
                else (
                    f"{words.capitalised(words.metric_name(metric))} was not measured here; "
                    f"{words.metric_name(shown)} is shown. "
                )
            )
            captions[name][metric] = f"{missing}{direction} is better."
    return captions


def _notes(groups: Sequence[Group], metric: str) -> list[str]:
    """What a reader must know before comparing rows, and of methods that do not do what they are for."""
    runs = [run for group in groups for run in group.runs]
    notes = [
        f"These runs differ in their {what} ({', '.join(sorted(names))}): compare rows with care."
        for what, names in (
            ("model", {run.summary.model for run in runs}),
            ("data", {run.summary.data for run in runs}),
        )
        if len(names) > 1
    ]
    for group in groups:
        seeds = [run.summary.seed for run in group.runs]
        if len(set(seeds)) < len(seeds):
            name = words.capitalised(group.label)
            notes.append(f"{name} has several runs of one seed: its intervals are not over seeds alone.")
    warned = [
        *unbeaten(groups, metric),
        *degenerate(groups),
        *partly_generated(groups),
        *truncated(groups),
        *left_out(groups),
    ]
    return notes + [f"{words.capitalised(text)}." for text in warned]


def _findings(groups: Sequence[Group], metric: str) -> list[str]:
    """What the numbers say, in sentences."""
    beaten = all_beat(groups, metric)
    return words.findings(groups, metric) + ([beaten] if beaten else [])


def _temperatures(results: Sequence[Summary]) -> str:
    """What logits were divided by after the last round: one number, or the least and the largest."""
    found = sorted(result.temperature for result in results if result.temperature is not None)
    ends = dict.fromkeys(f"{value:.3g}" for value in (*found[:1], *found[-1:]))
    return " to ".join(ends)


def _joined(names: set[str]) -> str:
    return ", ".join(sorted(names))


def _page_title(runs: Sequence[Run]) -> str:
    """Which model was customised, and on which data; of a path, its last part."""
    models, sources = (
        _joined(
            {
                name.rstrip("/").rpartition("/")[2] if name.startswith((".", "/", "~")) else name
                for name in names
            }
        )
        for names in ({run.summary.model for run in runs}, {run.summary.data for run in runs})
    )
    return f"Customising {models or 'a model'}" + (f" on {sources}" if sources else "")


def _facts(groups: Sequence[Group], runs: Runs) -> list[tuple[str, str]]:
    results = [run.summary for run in runs.finished]
    clients, scored = client_counts(runs.finished)
    facts = [
        ("Model", _joined({result.model for result in results})),
        ("Data", _joined({result.data for result in results})),
        ("Task", results[0].task),
        ("Clients", words.clients(clients, scored)),
        ("Rounds", " or ".join(map(str, sorted({result.rounds for result in results})))),
        ("Temperature", _temperatures(results)),
        (
            "Runs",
            f"{len(results)} finished" + (f", {len(runs.unfinished)} unfinished" if runs.unfinished else ""),
        ),
    ]
    return [(name, value) for name, value in facts if value]


def asset(name: str) -> str:
    """A file of the page: style, script or template."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def script_with_hash(text: str) -> tuple[Markup, str]:
    """A trusted script, and the hash by which the page's policy lets it run and no other."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Markup(text), f"'sha256-{digest}'"


def render(runs: Runs) -> str:
    """The page as text. Everything that comes from files is escaped: by the template, or where a chart is
    drawn.
    """
    groups = group_runs(runs.finished)
    metrics = metric_names(runs.finished)
    primary = best_group(groups, metrics[0])
    paint = colour(primary.method, groups)
    plots = figures(groups, metrics)
    captions = _captions(plots, metrics)
    predictions = list(read_predictions(primary.runs[0]))
    script, script_hash = script_with_hash(asset("page.js"))
    most_clients = max(len(run.summary.clients) for run in runs.finished)
    columns = comparison_columns(groups, metrics)
    headings = [
        (above, metric, len(list(same)))
        for (above, metric), same in groupby(columns, key=lambda column: (column.above, column.metric))
    ]
    sections: list[TableSection] = comparison_sections(groups, columns)
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(asset("page.html"))
    return template.render(
        title=_page_title(runs.finished),
        facts=_facts(groups, runs),
        findings=_findings(groups, metrics[0]),
        notes=_notes(groups, metrics[0]),
        metrics=[(metric, words.capitalised(words.metric_name(metric))) for metric in metrics],
        metric=metrics[0],
        columns=columns,
        headings=headings,
        sections=sections,
        starts=["" if place else " first" for *_, span in headings for place in range(span)],
        task="classification" if runs.finished[0].summary.task == "classification" else "generation",
        any_local=any(group.baseline == "local" for group in groups),
        boxed=most_clients >= BOX_FROM,
        unscored=_unscored(runs.finished),
        ends=ENDS if most_clients > MOST_POINTS else 0,
        width=1 + sum(not column.metric or column.metric == metrics[0] for column in columns),
        names={metric: words.capitalised(words.metric_name(metric)) for metric in metrics},
        compared=primary.baseline,
        several_methods=sum(group.baseline == primary.baseline for group in groups) > 1,
        several_seeds=any(len(group.runs) > 1 for group in groups),
        symbols=definitions(),
        plots={name: _by_metrics(drawn, metrics) for name, drawn in plots.items()},
        confusions=confusions(predictions, primary.runs[0].summary.labels),
        calibration=calibration(primary.runs[0], predictions, paint),
        paint=paint,
        captions=captions,
        clients=client_tables(groups, metrics),
        primary=words.run_title(primary, primary.runs[0]),
        examples=first_examples(groups, primary),
        left_out=clients_left_out(groups),
        private=promises(groups),
        timelines=timelines(groups),
        traffic=traffic(groups),
        audits=audit_tables(groups, metrics[0]),
        unfinished=runs.unfinished,
        logs=[
            (words.run_title(group, run), run.warnings[-LONGEST_LOG:])
            for group in groups
            for run in group.runs
            if run.warnings
        ],
        recipes=[(words.capitalised(group.label), group.runs) for group in groups],
        environment=_environment(runs.finished),
        style=Markup(palette() + "".join(map(asset, STYLES))),
        script=script,
        hash=script_hash,
    )


def write_report(directories: Sequence[Path], to: Path) -> Path:
    """Write one HTML page about all runs below ``directories`` to the file ``to`` and return its path.

    The page holds everything that it shows and loads nothing. The file appears whole or not at all; folders
    on the way to it are made.

    Raises:
        RunError: a folder holds no finished run, or a file in it is malformed.
    """
    page = render(read_runs(directories))
    write_text(to, page.encode("utf-8", errors="replace").decode("utf-8"))
    return to
