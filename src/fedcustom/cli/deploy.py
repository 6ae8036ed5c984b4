"""The ``deploy`` and ``site`` commands."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import DeploymentError
from .console import Overrides, Quiet, RecipeFile, command_line, display, err_console, out_console

deploy = typer.Typer(
    help="Run a recipe across sites, over NVIDIA FLARE with mutual TLS (docs/deployment.md).",
    no_args_is_help=True,
)
site = typer.Typer(help="Take part in a federation with one's own data.", no_args_is_help=True)

Folder = Annotated[
    Path, typer.Option("--federation", "-f", help="The federation's folder, on the server's machine")
]
Out = Annotated[Path | None, typer.Option(help="The run's directory (default: a name in runs/)")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped")]


@deploy.command()
def init(
    recipe: RecipeFile,
    sites: Annotated[str, typer.Option(help="Names of the sites, separated by commas")],
    server: Annotated[str, typer.Option(help="The server's host name, as sites reach it")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="The server's one port")] = 8002,
    folder: Folder = Path("federation"),
    overrides: Overrides = None,
) -> None:
    """Make certificates and a start-up kit for each site, and check that the recipe can be deployed."""
    from ..deployment.nvflare.kits import provision
    from ..deployment.parties import check_deployable
    from ..deployment.settings import FederationSettings, save_federation
    from ..deployment.site.template import write_site_template
    from ..recipe.recipe import load_recipe

    names = [name.strip() for name in sites.split(",") if name.strip()]
    complete = load_recipe(recipe, overrides or []).complete()
    check_deployable(complete)
    if folder.exists() and any(folder.iterdir()):
        raise DeploymentError(f"{folder}: is not empty; name another --federation")
    provision(folder, server, port, names)
    save_federation(folder, FederationSettings(server=server, port=port, sites=names))
    for name in names:
        write_site_template(folder / "sites" / name, complete)
    deployed = command_line("deploy", "run", recipe, overrides=overrides, options={"--federation": folder})
    for name in names:
        out_console.print(f"kit of {name}: {folder / 'sites' / name}", highlight=False, soft_wrap=True)
    out_console.print(
        "Hand each site its kit over a channel that both trust, then delete it here; keep authority/ to "
        "yourself.\nA site completes KIT/site.toml, which holds what the recipe asks for, and runs: "
        "fedcustom site start KIT --data KIT/site.toml\n"
        f"You run: {deployed}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


@deploy.command()
def run(
    recipe: RecipeFile,
    folder: Folder = Path("federation"),
    out: Out = None,
    overrides: Overrides = None,
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Start the server on this machine and run a recipe with the sites that are there."""
    from ..recipe.recipe import load_recipe

    checked = load_recipe(recipe, overrides or [])  # before what imports torch

    from .. import api
    from ..deployment.run import run_deployed

    directory = out or api.default_directory(recipe, checked)
    options = {"--federation": folder, "--out": directory, "--resume": True}
    again = command_line("deploy", "run", recipe, overrides=overrides, options=options)
    with display(again, quiet) as make:
        run_deployed(checked, folder, directory, resume=resume, callbacks=[make("")])
    _show(directory, quiet)


@deploy.command()
def local(
    recipe: RecipeFile,
    out: Out = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="A free port of this machine")] = 8002,
    overrides: Overrides = None,
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Try a deployment out: a server and all sites on this machine, each with a client's part of the data."""
    from ..recipe.recipe import load_recipe

    checked = load_recipe(recipe, overrides or [])  # before what imports torch

    from .. import api
    from ..deployment.local import run_locally

    directory = out or api.default_directory(recipe, checked)
    folder = directory.with_name(directory.name + ".federation")
    options = {"--out": directory, "--port": port, "--resume": True}
    again = command_line("deploy", "local", recipe, overrides=overrides, options=options)
    with display(again, quiet) as make:
        run_locally(checked, folder, directory, port=port, resume=resume, callbacks=[make("")])
    _show(directory, quiet)


@deploy.command()
def status(folder: Folder = Path("federation")) -> None:
    """Whether a run is under way, and which sites are connected."""
    from ..deployment import run as deployed

    found = deployed.status(folder)
    if found["process"] is None:
        out_console.print("no run is under way; the server is started by: fedcustom deploy run")
        return
    out_console.print(f"process {found['process']} drives a run", highlight=False)
    connected = found["connected"]
    for name in found["sites"]:
        state = "unknown (the server does not answer)" if connected is None else "not connected"
        if connected is not None and name in connected:
            state = "connected"
        out_console.print(f"{name}: {state}", highlight=False, markup=False)


@deploy.command()
def stop(folder: Folder = Path("federation")) -> None:
    """Stop the run that is under way, so that it can be resumed."""
    from ..deployment import run as deployed

    said = "the run was told to stop" if deployed.stop(folder) else "no run is under way"
    out_console.print(said, highlight=False)


@site.command()
def start(
    kit: Annotated[Path, typer.Argument(help="This site's start-up kit, a folder")],
    data: Annotated[Path, typer.Option("--data", help="This site's file: data, policy, threads (site.toml)")],
) -> None:
    """Take part in a federation until stopped (Ctrl-C); what dies meanwhile is started again."""
    from ..deployment.site.process import start_site

    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    start_site(kit, data, _note, stopped.is_set)


@site.command()
def check(data: Annotated[Path, typer.Option("--data", help="The file to check (site.toml)")]) -> None:
    """Check a site's file and its data: list every setting, what is read, and what the server is told."""
    from ..deployment.site.audit import printable
    from ..deployment.site.check import site_report
    from ..deployment.site.settings import describe, load_site

    settings = load_site(data)
    lines = list(site_report(settings, data))
    for key, value, default, help_text in describe():
        out_console.print(f"{key} ({value}, default {default}): {help_text}", highlight=False, markup=False)
    for line in lines:
        out_console.print(printable(line, None), highlight=False, markup=False, soft_wrap=True)
    out_console.print(f"{data}: in order", highlight=False, markup=False)


@site.command()
def cancel(kit: Annotated[Path, typer.Argument(help="This site's start-up kit, a folder")]) -> None:
    """Stop the task that the site is working on; the server is told that it was cancelled."""
    from ..deployment.site.process import cancel_task

    cancel_task(kit)
    out_console.print("the task under way, if there is one, is told to stop", highlight=False)


@site.command()
def ledger(kit: Annotated[Path, typer.Argument(help="This site's start-up kit, a folder")]) -> None:
    """Show what the site has answered and sent over all runs, as the limits of its policy count it."""
    from ..deployment.nvflare.kits import site_name
    from ..deployment.site.check import ledger_report

    out_console.print(f"site {site_name(kit)}", highlight=False, markup=False)
    for line in ledger_report(kit):
        out_console.print(line, highlight=False, markup=False)


def _show(directory: Path, quiet: bool) -> None:
    from ..report import comparison_table, write_report

    page = write_report([directory], directory / "report.html")
    if not quiet:
        out_console.print(comparison_table([directory]))
    out_console.print(f"run: {directory}\nreport: {page}", highlight=False, soft_wrap=True)


def _note(text: str) -> None:
    err_console.print(text, highlight=False, markup=False, soft_wrap=True)
