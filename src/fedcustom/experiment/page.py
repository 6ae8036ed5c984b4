"""What shows an experiment: tables for the documentation, and one page with tables and plots."""

from __future__ import annotations

import html
from collections.abc import Collection
from pathlib import Path

from ..core.files import read_json, write_text
from ..report import formatting as words
from .baselines import deciding_axes
from .paired import paired_tables
from .plots import dot_plot
from .results import Result, read_results
from .settings import BASELINE, ExperimentSettings, load_experiment
from .tables import Table, cost_table, facets, grouped, metric_of, score_tables, search_table

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 70rem; margin: 2rem auto }
table { border-collapse: collapse; margin: 0 0 1.5rem } h3 { margin: 1.5rem 0 .4rem }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #d9dee3; white-space: nowrap }
th:first-child, td:first-child { text-align: left } .wide { overflow-x: auto } svg { max-width: 45rem }
"""


def write_tables(file: Path, results: Path) -> list[Path]:
    """Write ``tables.md``, ``index.html`` and a plot a facet (``plot-<n>.svg``) beside the results.

    Raises:
        RecipeError: the file is not in order.
        RunError: there are no results.
    """
    settings, _ = load_experiment(file)
    found = [result for result in read_results(results) if _fits(settings, result)]
    groups = grouped(found)
    search = results / "search.json"
    shown = [
        *score_tables(settings, groups), *paired_tables(settings, groups), cost_table(settings, groups)
    ]  # fmt: skip
    if search.exists():
        shown.append(search_table(read_json(search)))
    facts = _facts(file, found)
    metric = metric_of(settings.report, groups)
    plots = [(facet.heading, dot_plot(facet, metric)) for facet in facets(settings, groups)]
    written = [results / "tables.md", results / "index.html"]
    text = "\n\n".join([f"# Experiment {file.stem}", *facts, *(table.markdown() for table in shown)])
    write_text(written[0], text + "\n")
    for number, (_, plot) in enumerate(plots, start=1):
        if plot:
            write_text(results / f"plot-{number}.svg", plot + "\n")
            written.append(results / f"plot-{number}.svg")
    write_text(written[1], _page(file.stem, facts, plots, shown))
    return written


def _fits(settings: ExperimentSettings, result: Result) -> bool:
    """Whether the file still knows the result's points; those of an older grid are left out."""
    points: dict[str, Collection[str]] = {**settings.points()}
    if settings.is_added(result.points):
        points = {BASELINE: settings.baselines} | {axis: points[axis] for axis in deciding_axes(settings)}
    return result.points.keys() == points.keys() and all(
        result.points[axis] in there for axis, there in points.items()
    )


def _facts(file: Path, results: list[Result]) -> list[str]:
    seeds = ", ".join(str(seed) for seed in sorted({result.seed for result in results}))
    machines = sorted({str(result.machine.get("processor")) for result in results})
    commits = sorted({str(result.machine.get("git_commit"))[:10] for result in results})
    cuts = [
        f"{'--'.join([*result.points.values(), f'seed-{result.seed}'])}: {text}."
        for result in results
        for text in result.more.get("cuts", [])
    ]
    return [
        f"Made by `fedcustom experiment {file} --report` from {words.plural(len(results), 'result')}; "
        f"seeds {seeds}. Means over seeds, ± half of the 95 % interval (Student's t); test split, with the "
        "state that was best on the development split.",
        f"Machine: {', '.join(machines)}. Commit: {', '.join(commits)}.",
        *cuts,
    ]


def _page(name: str, facts: list[str], plots: list[tuple[str, str]], tables: list[Table]) -> str:
    title = html.escape(f"Experiment {name}")
    parts = ["<!doctype html><html lang='en'><head><meta charset='utf-8'>",
             f"<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>"]  # fmt: skip
    parts += [f"<p>{html.escape(fact)}</p>" for fact in facts]
    for heading, plot in plots:
        parts.append(f"<h3>{html.escape(heading)}</h3>{plot}" if heading else plot)
    for table in tables:
        head = "".join(f"<th>{html.escape(text)}</th>" for text in table.columns)
        rows = ("".join(f"<td>{html.escape(text)}</td>" for text in row) for row in table.rows)
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        parts.append(f"<h3>{html.escape(table.heading)}</h3><div class='wide'>")
        parts.append(f"<table><tr>{head}</tr>{body}</table></div>")
    return "\n".join([*parts, "</body></html>\n"])
