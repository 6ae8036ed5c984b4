"""One self-contained HTML page from run directories."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import groupby, islice
from pathlib import Path

import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..core.files import write_text
from . import formatting as words
from .audits import audit_tables
from .baselines import all_beat, degenerate, left_out, partly_generated, truncated, unbeaten
from .calibration import Bin, reliability, reliability_charts, verdict
from .confusion import confusions
from .groups import Group, best_group, client_counts, client_scores, group_runs, lower_is_better, metric_names
from .methods import palette
from .plots import BOX_FROM, ENDS, MOST_POINTS, Plots, colour, figures
from .read import Prediction, Run, Runs, Summary, read_predictions, read_runs
from .rows import TableSection, comparison_columns, comparison_sections
from .svg import definitions
from .timeline import timelines
from .traffic import traffic

STYLES = ("palette.css", "style.css", "print.css")
EXAMPLES = 10
LONGEST_TEXT = 800
SPENT_SHOWN = 8
"""Rounds of which it is told what was spent of epsilon, about."""

LONGEST_LOG = 20_000
MOST_VALUES = 4
MOST_CLIENTS = 200
"""Clients that a table of all of them lists; of more, the worst."""


@dataclass(frozen=True, slots=True)
class Example:
    """One test example as it is shown; ``correct`` is None where right and wrong do not apply."""

    given: str
    expected: list[str]
    prediction: str
    probability: str
    correct: bool | None


@dataclass(frozen=True, slots=True)
class Examples:
    """The first test examples of one run."""

    label: str
    paint: str
    shown: list[Example]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A client that was left out of some rounds of a run, and why."""

    run: str
    client: str
    reason: str
    rounds: str


@dataclass(frozen=True, slots=True)
class ClientTable:
    """Each client's score by group, for one metric."""

    metric: str
    headings: list[str]
    rows: list[tuple[str, list[str]]]
    left_out: int


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"


def _example(line: Prediction) -> Example:
    classified = line.label is not None
    references = [line.references] if isinstance(line.references, str) else line.references
    return Example(
        given=_shortened(line.text or line.source),
        expected=[str(line.label)] if classified else [_shortened(text) for text in references],
        prediction=_shortened(str(line.prediction)),
        probability="" if line.probability is None else f"{line.probability:.2f}",
        correct=str(line.label) == str(line.prediction) if classified else None,
    )


def _examples(groups: Sequence[Group], first: Group) -> list[Examples]:
    shown = []
    for group in sorted(groups, key=lambda group: group is not first):
        run = group.runs[0]
        items = [_example(line) for line in islice(read_predictions(run), EXAMPLES)]
        if items:
            label = f"{words.capitalised(group.label)}, seed {run.summary.seed}"
            shown.append(Examples(label, colour(group.method, groups), items))
    return shown


@dataclass(frozen=True, slots=True)
class Calibration:
    """How far one run's probabilities are to be believed: in a sentence, as charts and bin by bin."""

    verdict: str
    temperature: str
    charts: Markup
    bins: list[Bin]


def _calibration(run: Run, predictions: Sequence[Prediction], paint: str) -> Calibration | None:
    bins = reliability(predictions)
    filled = [each for each in bins if each.count]
    if not filled:
        return None
    found = run.summary.temperature
    divided = "" if found is None else f"Logits are divided by {found:.3g}, the temperature."
    return Calibration(verdict(bins), divided, reliability_charts(bins, paint), filled)


@dataclass(frozen=True, slots=True)
class Private:
    """What a run promises of privacy, and what its rounds have spent: some of them, the last one too."""

    run: str
    unit: str
    epsilon: str
    delta: str
    note: str
    spent: str


def _private(groups: Sequence[Group]) -> list[Private]:
    found = []
    for group in groups:
        for run in group.runs:
            if (promise := run.summary.privacy) is None:
                continue
            rows = [line for line in run.history if line.epsilon is not None]
            chosen = rows[:: max(1, len(rows) // SPENT_SHOWN)]
            chosen += rows[-1:] if rows and rows[-1] not in chosen else []
            spent = ", ".join(f"{line.epsilon:.2f} (round {line.round})" for line in chosen)
            note = "" if promise.valid else "The noise can be repeated from the seed: nothing is promised."
            epsilon, delta = f"{promise.epsilon:.4g}", f"{promise.delta:g}"
            found.append(Private(_title(group, run), promise.unit, epsilon, delta, note, spent))
    return found


def _left_out(groups: Sequence[Group]) -> list[LeftOut]:
    found = []
    for group in groups:
        for run in group.runs:
            rounds: dict[tuple[str, str], list[int]] = {}
            for line in run.history:
                for client, reason in line.left_out.items():
                    rounds.setdefault((client, reason), []).append(line.round)
            found += [
                LeftOut(_title(group, run), client, _shortened(reason), words.rounds(numbers))
                for (client, reason), numbers in rounds.items()
            ]
    return found


def _title(group: Group, run: Run) -> str:
    return f"{words.capitalised(group.label)}, seed {run.summary.seed}"


def _client_tables(groups: Sequence[Group], metrics: Sequence[str]) -> list[ClientTable]:
    tables = []
    for metric in metrics:
        columns = {group.label: client_scores(group, metric).set_index("client")["score"] for group in groups}
        columns = {label: scores for label, scores in columns.items() if not scores.empty}
        every = dict.fromkeys(str(client) for scores in columns.values() for client in scores.index)
        clients = _worst(list(every), list(columns.values()), metric)
        rows = [
            (
                client,
                [words.score(float(scores.get(client, float("nan"))), metric) for scores in columns.values()],
            )
            for client in clients
        ]
        if rows:
            headings = [words.capitalised(label) for label in columns]
            tables.append(ClientTable(metric, headings, rows, len(every) - len(rows)))
    return tables


def _worst(clients: list[str], columns: Sequence[pd.Series], metric: str) -> list[str]:
    """The clients that a table shows: all in their order or, of many, those that are worst on average."""
    if len(clients) <= MOST_CLIENTS:
        return clients
    means = pd.concat(columns, axis=1).mean(axis=1)
    return [str(client) for client in means.sort_values(ascending=not lower_is_better(metric)).index][
        :MOST_CLIENTS
    ]


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
        calibration=_calibration(primary.runs[0], predictions, paint),
        paint=paint,
        captions=captions,
        clients=_client_tables(groups, metrics),
        primary=_title(primary, primary.runs[0]),
        examples=_examples(groups, primary),
        left_out=_left_out(groups),
        private=_private(groups),
        timelines=timelines(groups),
        traffic=traffic(groups),
        audits=audit_tables(groups, metrics[0]),
        unfinished=runs.unfinished,
        logs=[
            (_title(group, run), run.warnings[-LONGEST_LOG:])
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
