"""The ``audit`` command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from .console import Overrides, Quiet, command_line, display, err_console, note, out_console

if TYPE_CHECKING:
    from ..audit.results import Audit, Finding


def audit(
    what: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_RECIPE", help="A finished run's directory, or a recipe that is run first (TOML)"
        ),
    ],
    attacks: Annotated[
        str,
        typer.Option(
            help="Attacks, separated by commas: sums, tokens, candidates, inversion, backdoor, canaries, "
            "membership (default: all)"
        ),
    ] = "",
    minutes: Annotated[
        float, typer.Option(help="Time for replay and attacks; what is left over is listed, not made")
    ] = 5.0,
    out: Annotated[
        Path | None, typer.Option(help="The run's directory, for a recipe (default: a name in runs/)")
    ] = None,
    overrides: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Attack a run of your own and say what leaks: its rounds are repeated from its checkpoints, and each
    attack sees what the server, other clients or anybody would see. Writes audit.json and the report. Exit
    code 1 where a lower bound on epsilon is above what the run promises.

    Example: fedcustom audit runs/first --attacks candidates --minutes 2
    """
    from ..audit.names import check_names
    from ..core.errors import RecipeError, RunError

    names = [name.strip() for name in attacks.split(",") if name.strip()]
    check_names(names)
    if not 0 < minutes < 1e6:
        raise RunError(f"--minutes {minutes:g}: must be a positive number")
    is_run = what.is_dir()
    if is_run and (out is not None or overrides):
        option = "--out" if out is not None else "--set"
        raise RecipeError(f"{option}: is for a recipe that is run first; {what} is a run's directory")
    if not is_run and not what.exists():
        raise RunError(f"{what}: no such run or recipe")
    options = {"--attacks": attacks or None, "--minutes": minutes if minutes != 5 else None, "--out": out}
    with display(command_line("audit", what, overrides=overrides, options=options), quiet) as make:
        directory = what
        if not is_run:
            from ..recipe.recipe import load_recipe

            checked = load_recipe(what, overrides or [])  # before what imports torch, which takes seconds

            from .. import api

            directory = out or api.default_directory(what, checked)
            from ..audit.run import run_to_audit

            run_to_audit(checked, directory, [make("")])

        from ..audit.run import audit_run

        found = audit_run(directory, attacks=names, minutes=minutes, callbacks=make("audit"))

    from ..report import write_report

    page = write_report([directory], directory / "report.html")
    show(found, directory)
    out_console.print(f"audit: {directory / 'audit.json'}\nreport: {page}", soft_wrap=True)
    if found.broken:
        raise typer.Exit(1)


def show(found: Audit, directory: Path) -> None:
    """Print the table of an audit, and what was not done."""
    from ..audit.words import bound, interval, replayed, success

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in ("attack", "view", "round"):
        table.add_column(heading)
    table.add_column("measure", overflow="fold", max_width=24)
    for heading in ("success", "chance", "candidates"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("what it means", overflow="fold")
    for each in found.findings:
        table.add_row(*_cells(each, success(each), interval(each)))
    if found.findings:
        out_console.print(table)
    else:
        out_console.print("no attack was made")
    for left in found.not_run:
        where = f", round {left.round}" if left.round is not None else ""
        note(f"not made: {left.attack}{where}: {left.reason}")
    out_console.print(replayed(found), soft_wrap=True)
    for each in found.broken:
        err_console.print(f"broken promise: {bound(each, found)}", style="bold red", soft_wrap=True)


def _cells(finding: Finding, shown: str, interval: str) -> list[str]:
    from ..audit.words import chance, count, place

    return [
        finding.attack,
        finding.view,
        place(finding),
        finding.measure,
        f"{shown}\n{interval}" if interval else shown,
        chance(finding),
        count(finding.candidates),
        finding.meaning,
    ]
