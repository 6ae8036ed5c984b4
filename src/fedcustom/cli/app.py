"""The command line application."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.table import Table
from typer.core import TyperGroup

from ..core.errors import FedcustomError
from ..core.library_errors import in_one_line, while_loading
from ..core.memory_errors import HINT, out_of_memory
from .answers import ask, chat, index, predict
from .audit import audit
from .certificates import deploy, site
from .check import check
from .console import (
    Overrides,
    Quiet,
    RecipeFile,
    RunDirectory,
    command_line,
    display,
    err_console,
    note,
    out_console,
    write_any_text,
)
from .doctor import doctor
from .estimate import estimate
from .experiment import experiment
from .new import new
from .privacy import privacy
from .serve import serve
from .watch import watch


class InOrder(TyperGroup):
    """The commands in the order in which they are needed."""

    def list_commands(self, context: Any) -> list[str]:
        """Their names, for ``--help``."""
        order = (
            "new", "check", "run", "compare", "experiment", "estimate", "privacy", "watch", "report", "audit",
            "predict", "chat", "serve", "export", "recipe", "index", "ask", "deploy", "site", "doctor",
            "cache",
        )  # fmt: skip
        return sorted(self.commands, key=order.index)


app = typer.Typer(
    cls=InOrder,
    help="Customise a large pretrained model with data that stays with its owners.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(new)
app.command()(check)
app.command()(experiment)
app.command()(estimate)
app.command()(privacy)
app.command()(watch)
app.command()(audit)
app.command()(predict)
app.command()(chat)
app.command()(doctor)
app.command()(serve)
app.command()(index)
app.command()(ask)
app.add_typer(deploy, name="deploy")
app.add_typer(site, name="site")

DEBUG = "--debug"
"""The option that shows tracebacks; :func:`main` takes it from anywhere on the command line."""

COMPARED = "prefix,lora,soft_prompt,full"
NoCheck = Annotated[
    bool,
    typer.Option(
        "--no-check",
        help="Do not load the written model in a fresh process to compare its outputs with the trained one's",
    ),
]


def main() -> NoReturn:
    """Run the command line; what a user can mend is one line on standard error and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, _stop)
    write_any_text()
    debug = DEBUG in sys.argv[1:]
    arguments = [argument for argument in sys.argv[1:] if argument != DEBUG]
    try:
        app(args=arguments, standalone_mode=True)
    except FedcustomError as error:
        _fail(str(error), error, debug)
    except BrokenPipeError:  # the reader of our output has gone, as in: fedcustom ... | head
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        sys.exit(0)
    except OSError as error:
        what = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        _fail(what, error, debug)
    except Exception as error:
        if out_of_memory(error):
            _fail(f"out of memory: {in_one_line(error)[:200]}; {HINT} (docs/memory.md)", error, debug)
        if not while_loading(error):
            raise
        _fail(f"{in_one_line(error)} ({DEBUG} shows where it comes from)", error, debug)
    sys.exit(0)


def _fail(text: str, error: BaseException, debug: bool) -> NoReturn:
    """Say in one line what is wrong, with ``debug`` after the traceback, and exit with code 2."""
    if debug:
        err_console.print("".join(traceback.format_exception(error)), soft_wrap=True)
    err_console.print(f"error: {text}", style="bold red", soft_wrap=True)
    sys.exit(2)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"fedcustom {version('fedcustom')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit")
    ] = False,
    debug: Annotated[
        bool, typer.Option(DEBUG, help="With an error, show the traceback too (anywhere on the command line)")
    ] = False,
) -> None:
    """Customise a large pretrained model with data that stays with its owners."""


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
def export(
    directory: RunDirectory,
    to: Annotated[Path, typer.Option(help="A new or an empty folder for the model")],
    form: Annotated[
        Literal["model", "feed-forward"],
        typer.Option(
            "--as",
            help="feed-forward: a plain model with wider feed-forward networks, without code of its own "
            "(prefix with kind = 'memory', distilled on --text; adapter)",
        ),
    ] = "model",
    text: Annotated[
        Path | None, typer.Option(help="Public texts for --as feed-forward, one unlabelled text a line")
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(
            min=1, help="Extra units in each network for --as feed-forward (default: as many numbers)"
        ),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Add a LoRA or IA3 adapter to the base model's weights")
    ] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="REPOSITORY",
            help="Upload the folder to this repository of the Hugging Face hub (after: hf auth login)",
        ),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="With --push-to-hub: for everybody to see (default: private)")
    ] = False,
    no_check: NoCheck = False,
) -> None:
    """Write the customised model to a folder, to be loaded by peft or transformers without this package, with
    a model card.

    Example: fedcustom export runs/first --to my-model --merge
    """
    from .. import api
    from ..exporting.hub import check_repository

    if public and push_to_hub is None:
        raise FedcustomError("--public: has an effect with --push-to-hub alone")
    finished = api.load(directory)
    if push_to_hub is not None:
        check_repository(push_to_hub)  # before what takes long
    folder = finished.export(
        to, form=form, text=text, slots=slots, merge=merge, check=not no_check, note=note
    )
    out_console.print(f"model: {folder} (its README.md shows how to load it)", soft_wrap=True)
    if push_to_hub is not None:
        out_console.print(f"hub: {finished.push_to_hub(folder, push_to_hub, public=public, note=note)}")


@app.command()
def recipe(
    file: Annotated[
        Path | None,
        typer.Argument(
            help="A recipe to check and print complete; with --help-all a section, method or setting"
        ),
    ] = None,
    overrides: Overrides = None,
    help_all: Annotated[
        bool,
        typer.Option("--help-all", help="List every setting with its default, or those of one section"),
    ] = False,
) -> None:
    """Check a recipe and print it complete; without one, print a recipe to start from.

    Example: fedcustom recipe --help-all training
    """
    from ..recipe.help import section_help, settings_help
    from ..recipe.recipe import Recipe, load_recipe, to_toml

    if help_all:
        table = Table(box=None, pad_edge=False, show_edge=False)
        table.add_column("setting", no_wrap=True)  # a name that is broken cannot be copied
        for heading in ("type", "default", "what it is"):
            table.add_column(heading, overflow="fold")
        for key, kind, default, help_text in (
            settings_help(Recipe) if file is None else section_help(Recipe, str(file))
        ):
            style = "bold" if key.startswith("[") else ""
            table.add_row(
                key, kind, default, help_text,
                style=style,
            )  # fmt: skip
        out_console.print(table)
        return
    if file is not None:
        checked = load_recipe(file, overrides or [])  # before what imports torch, which takes seconds

        from ..data.build import check_first_rows, with_builtin_columns

        check_first_rows(*with_builtin_columns(checked.data, checked.clients))

        from ..federated.resolve import resolved

        chosen = resolved(checked)
    else:
        chosen = load_recipe(Recipe(), overrides or [])  # to begin with: what depends on the rest stays open
    print(to_toml(chosen), end="")


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove what is there")] = False,
) -> None:
    """Show or clear the cache folder: parsed docstrings of installed packages, and converted models. No
    client's data are in it.

    Example: fedcustom cache --clear
    """
    from ..core.cache import cache_folder, cache_size, clear_cache

    found = clear_cache() if clear else cache_size()
    text = f"{cache_folder()}: {found.files} files, {found.bytes:,} bytes"
    out_console.print(f"{text} removed" if clear else text, soft_wrap=True)


def _stop(*_: object) -> None:
    """End as Ctrl-C does. SIGINT itself would not do: a shell lets its background jobs ignore it."""
    raise KeyboardInterrupt


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
