"""The ``run``, ``compare`` and ``report`` commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .console import (
    NoCheck,
    Overrides,
    Quiet,
    RecipeFile,
    command_line,
    display,
    err_console,
    note,
    out_console,
)

COMPARED = "prefix,lora,soft_prompt,full"


def run(
    recipe: RecipeFile,
    out: Annotated[Path | None, typer.Option(help="The run's directory (default: a name in runs/)")] = None,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped")] = False,
    data_changed: Annotated[
        Literal["refuse", "accept"],
        typer.Option(help="What to do where the rows are not those that the run in --out began with"),
    ] = "refuse",
    no_check: NoCheck = False,
    quiet: Quiet = False,
) -> None:
    """Run a recipe: customise a model with its clients' data.

    Example: fedcustom run recipe.toml --out runs/first
    """
    from ..recipe.recipe import load_recipe

    checked = load_recipe(recipe, overrides or [])  # before what imports torch, which takes seconds

    from .. import api

    directory = out or api.default_directory(recipe, checked)
    again = command_line("run", recipe, overrides=overrides, options={"--out": directory, "--resume": True})
    with display(again, quiet) as make:
        api.run(
            checked,
            out=directory,
            resume=resume,
            callbacks=[make("")],
            data_changed=data_changed,
            check_export=not no_check,
        )

    from ..report import comparison_table, write_report  # of use when there is something to report

    page = write_report([directory], directory / "report.html")
    if not quiet:
        out_console.print(comparison_table([directory]))
    out_console.print(f"run: {directory}\nreport: {page}", soft_wrap=True)


def compare(
    recipe: RecipeFile,
    methods: Annotated[str, typer.Option(help="Methods to compare, separated by commas")] = COMPARED,
    baselines: Annotated[str, typer.Option(help="centralised, local, or both, separated by a comma")] = "",
    baseline_methods: Annotated[
        str, typer.Option(help="Methods of the baselines (default: the recipe's own method)")
    ] = "",
    seeds: Annotated[
        int, typer.Option(min=1, help="Runs of each, with seeds counting up from the recipe's")
    ] = 1,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs (default: runs/<recipe>)")] = None,
    no_probe: Annotated[
        bool,
        typer.Option(
            "--no-probe",
            help="Leave out what is added for methods to beat: the probe of classifiers; zero-shot and "
            "few-shot where texts are generated",
        ),
    ] = False,
    jobs: Annotated[
        int, typer.Option(min=1, help="Runs at the same time, each in a process with its share of the cores")
    ] = 1,
    overrides: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Compare methods and baselines on one recipe; finished runs are not run again. Classifiers are held
    against a probe: logistic regression on the frozen model's vectors. Where texts are generated, methods are
    held against the untuned model, zero-shot and with four examples in its context.

    Example: fedcustom compare recipe.toml --methods prefix,lora --seeds 3 --out runs/compared
    """
    from ..recipe.recipe import load_recipe

    folder = out or Path("runs") / recipe.stem
    checked, reasons = load_recipe(recipe, overrides or []), list[str]()  # before what imports torch

    from ..experiment.compare import (
        check_folder,
        comparison_cells,
        label,
        run_comparison,
        run_directory,
        with_baselines,
    )
    from ..federated.composed_privacy import composed
    from ..federated.private_run import count_clients
    from ..report import comparison_table, write_report

    cells = comparison_cells(
        checked,
        _names(methods),
        _names(baselines),
        seeds,
        baseline_methods=_names(baseline_methods) or None,
    )
    if not no_probe:
        cells, reasons = with_baselines(checked, seeds, cells)
    check_folder(folder, checked)
    for reason in [*reasons, *composed((cell.recipe for cell in cells), count_clients)]:
        note(reason)
    options = {
        "--methods": methods if methods != COMPARED else None,
        "--baselines": baselines or None,
        "--baseline-methods": baseline_methods or None,
        "--seeds": seeds if seeds != 1 else None,
        "--out": out,
        "--no-probe": no_probe,
        "--jobs": jobs if jobs != 1 else None,
    }
    with display(command_line("compare", recipe, overrides=overrides, options=options), quiet) as make:
        failed = run_comparison(
            cells, folder, jobs, progress_for=make, tell=None if quiet else note, warn=note
        )
    finished = [run_directory(cell, folder) for cell in cells if label(cell) not in failed]
    if finished:
        page = write_report([folder], folder / "report.html")
        out_console.print(comparison_table(finished))
        out_console.print(f"report: {page}", soft_wrap=True)
    for name in [label(cell) for cell in cells if cell.added and label(cell) in failed]:
        note(f"no {name}: {failed.pop(name)}")
    for name, error in failed.items():
        err_console.print(f"error: {name}: {error}", style="bold red", soft_wrap=True)
    if failed:
        raise typer.Exit(2)


def report(
    directories: Annotated[list[Path], typer.Argument(help="Run directories, or folders that hold some")],
    out: Annotated[
        Path | None, typer.Option(help="The page (default: report.html in the first directory)")
    ] = None,
) -> None:
    """Write one self-contained HTML page about runs, and print their table.

    Example: fedcustom report runs/first
    """
    from ..report import comparison_table, write_report

    page = write_report(directories, out or directories[0] / "report.html")
    out_console.print(comparison_table(directories))
    out_console.print(f"report: {page}", soft_wrap=True)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
