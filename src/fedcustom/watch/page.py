"""The page as parts, each of which is renewed by itself when it changes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from ..report import formatting as words
from ..report.groups import Group, group_runs, lower_is_better, metric_names
from ..report.methods import palette
from ..report.page import STYLES, asset, script_with_hash
from ..report.plots import by_bytes, by_round, colour
from ..report.svg import definitions
from ..report.timeline import state_of, timeline
from ..report.traffic import Traffic, traffic_of
from .runs import TRAIN_LOSS, LiveRun

SECONDS = 2.0
"""Between two looks at the runs."""

POLICY = (
    "default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True, slots=True)
class Line:
    """A run in the table of all runs."""

    name: str
    what: str
    paint: str
    state: str
    progress: str
    share: float
    scores: list[tuple[str, str]]
    best: list[tuple[str, str]]
    cohort: str
    sent: str
    left: str
    at: str
    warned: bool


@dataclass(frozen=True, slots=True)
class Site:
    """A client of a run: what became of it in the last round that asked it, and its traffic."""

    state: str
    text: str
    traffic: Traffic


@dataclass(frozen=True, slots=True)
class Detail:
    """A run by itself."""

    key: str
    name: str
    state: str
    deployed: bool
    sites: list[Site]
    timeline: Markup | None
    warnings: str
    unreadable: list[str]
    recipe: str


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot of runs of one task, for each metric."""

    name: str
    heading: str
    caption: str
    charts: list[tuple[str, Markup]]


def parts(runs: Sequence[LiveRun], more: int) -> dict[str, str]:
    """The page's parts as HTML by name. Everything that comes from files is escaped."""
    drawn = [live for live in runs if live.run.history and live.run.summary.metrics]
    metrics = _metrics(drawn)
    tasks = dict.fromkeys(live.run.summary.task for live in drawn)
    groups = {task: group_runs([e.run for e in drawn if e.run.summary.task == task]) for task in tasks}
    paints = {
        run.directory: colour(group.method, found)
        for found in groups.values()
        for group in found
        for run in group.runs
    }
    finished = sum(live.state == "finished" for live in runs)
    template = _template("parts.html")
    common = {
        "metrics": [(metric, words.capitalised(words.metric_name(metric))) for metric in metrics],
        "metric": metrics[0] if metrics else "",
        "lines": [_line(live, metrics, paints.get(live.directory, "")) for live in runs],
        "details": [_detail(live, number) for number, live in enumerate(runs)],
        "plots": [
            plot for task, found in groups.items() for plot in _plots(found, metrics, task, len(tasks))
        ],
        "finished": finished,
        "more": more,
    }
    return {
        name: template.render(part=name, **common).strip() for name in ("chooser", "runs", "plots", "details")
    }


def page(parts: dict[str, str], title: str) -> tuple[str, str]:
    """The whole page with its parts as they are now, and its content security policy."""
    scripts = [script_with_hash(asset("page.js")), script_with_hash(_own("watch.js"))]
    policy = POLICY.format(scripts=" ".join(digest for _, digest in scripts))
    style = palette() + "".join(map(asset, STYLES)) + _own("watch.css")
    text = _template("page.html").render(
        title=title,
        parts={name: Markup(content) for name, content in parts.items()},
        style=Markup(style),
        symbols=definitions(),
        scripts=[script for script, _ in scripts],
        seconds=SECONDS,
    )
    return text, policy


def _metrics(runs: Sequence[LiveRun]) -> list[str]:
    """The metrics to choose from; those that only the final test has, which have no curve, come last."""
    scored = [live.run for live in runs if live.run.summary.metrics]
    by_round = {name for live in runs for line in live.run.history for name in line.development}
    found = sorted(metric_names(scored) if scored else [], key=lambda name: name not in by_round)
    trained = TRAIN_LOSS in by_round
    return [*found, *([TRAIN_LOSS] if trained and TRAIN_LOSS not in found else [])]


def _plots(groups: Sequence[Group], metrics: Sequence[str], task: str, tasks: int) -> list[Plot]:
    of = f" ({task})" if tasks > 1 else ""
    several = any(len(group.runs) > 1 for group in groups)
    seeds = ", mean and 95% interval over seeds" if several else ""
    found = []
    for name, draw, heading, caption in (
        ("rounds", by_round, "Quality by round", f"On the development split{seeds}."),
        ("bytes", by_bytes, "Quality against bytes sent", "Bytes up and down, all clients."),
    ):
        charts = [(metric, chart) for metric in metrics if (chart := draw(groups, metric)) is not None]
        if charts:
            found.append(Plot(f"{name}-{task}", heading + of, caption, charts))
    return found


def _line(live: LiveRun, metrics: Sequence[str], paint: str) -> Line:
    run = live.run
    asked = [row for row in run.history if row.cohort]
    cohort = ""
    if asked:
        row = asked[-1]
        cohort = f"{len(row.cohort) - len(row.left_out)} of {len(row.cohort)}"
    sent = run.history[-1].bytes_up_total + run.history[-1].bytes_down_total if run.history else 0.0
    last = live.last_round or 0
    what = f"{run.summary.baseline} {run.summary.method}, seed {run.summary.seed}" if run.recipe else ""
    done = live.rounds if live.state == "finished" and live.rounds else last
    return Line(
        name=live.name,
        what=what,
        paint=paint,
        state=live.state,
        progress=f"{done} of {live.rounds}" if live.rounds else "",
        share=done / live.rounds if live.rounds else 0.0,
        scores=[(metric, _latest(live, metric)) for metric in metrics],
        best=[(metric, _best(live, metric)) for metric in metrics],
        cohort=cohort,
        sent=words.byte_count(sent) if run.history else "",
        left=_left(live),
        at=time.strftime("%H:%M:%S", time.localtime(live.changed)) if live.changed else "",
        warned=bool(run.warnings or live.unreadable),
    )


def _latest(live: LiveRun, metric: str) -> str:
    found = [row.development[metric] for row in live.run.history if metric in row.development]
    return words.score(found[-1], metric) if found else ""


def _best(live: LiveRun, metric: str) -> str:
    found = [row.development[metric] for row in live.run.history if metric in row.development]
    return words.score((min if lower_is_better(metric) else max)(found), metric) if found else ""


def _left(live: LiveRun) -> str:
    """How long the remaining rounds take, if they take as long as those before in the mean."""
    trained = [sum(row.seconds.values()) for row in live.run.history if row.round]
    remaining = live.rounds - (live.last_round or 0)
    if live.state != "running" or not trained or remaining <= 0:
        return ""
    return words.duration(remaining * sum(trained) / len(trained))


def _detail(live: LiveRun, number: int) -> Detail:
    run = live.run
    federated = run.summary.baseline == "federated"
    return Detail(
        key=f"run-{number}",
        name=live.name,
        state=live.state,
        deployed=run.deployed,
        sites=[_site(live, line) for line in traffic_of("", run)] if federated else [],
        timeline=timeline(run.history) if federated else None,
        warnings=run.warnings,
        unreadable=live.unreadable,
        recipe=run.recipe,
    )


def _site(live: LiveRun, line: Traffic) -> Site:
    """A client's present state, by the last round that asked it."""
    states = [(row, state) for row in live.run.history if (state := state_of(row, line.client))]
    row, state = states[-1]
    if state != "absent":
        by = f" by {words.plural(row.late[line.client], 'round')}" if state == "late" else ""
        return Site(state, f"{state}{by} in round {row.round}", line)
    since = row.round
    for before, its in reversed(states):
        if its != "absent":
            break
        since = before.round
    return Site(state, f"absent since round {since}: {row.left_out[line.client]}", line)


def _template(name: str) -> Template:
    return Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(_own(name))


def _own(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
