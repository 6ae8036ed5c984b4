"""The ``experiment`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import RunError
from .console import command_line, err_console, out_console

ExperimentFile = Annotated[Path, typer.Argument(help="The experiment, a TOML file (docs/experiment.md)")]


def experiment(
    file: ExperimentFile,
    list_: Annotated[
        bool, typer.Option("--list", help="Show the cells and an estimate of their time; run nothing")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Write tables and plots from the results; run nothing")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time, each with one thread")] = 1,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="AXIS=POINT,...",
            help="Restrict the grid, e.g. --only method=prefix; repeatable",
        ),
    ] = None,
    runs: Annotated[Path | None, typer.Option(help="Folder of the runs (default: runs/<name>)")] = None,
    results: Annotated[
        Path | None, typer.Option(help="Folder of the results (default: results/<name>)")
    ] = None,
) -> None:
    """Run a grid of recipes: what is done is not run again; one that fails does not stop the others.

    Example: fedcustom experiment experiments/protocol.toml --jobs 2
    """
    from ..experiment.experiment import open_experiment
    from ..experiment.grid import parse_only
    from ..experiment.page import write_tables

    opened = open_experiment(file, runs, results, parse_only(only or []))
    if list_:
        for line in opened.listing():
            out_console.print(line, soft_wrap=True)
        return
    failed: dict[str, str] = {}
    if not report:
        try:
            failed = opened.run(jobs, _say)
        except KeyboardInterrupt:
            options = {
                "--jobs": jobs if jobs != 1 else None,
                "--only": only,
                "--runs": runs,
                "--results": results,
            }
            _say(f"stopped; go on with: {command_line('experiment', file, options=options)}")
            raise typer.Exit(130) from None
    try:
        for path in write_tables(file, opened.results):
            out_console.print(str(path), soft_wrap=True)
    except RunError:
        if not failed:
            raise
    for name, reason in failed.items():
        err_console.print(f"error: {name}: {reason}", style="bold red", soft_wrap=True)
    if failed:
        raise typer.Exit(2)


def _say(text: str) -> None:
    err_console.print(text, soft_wrap=True)
