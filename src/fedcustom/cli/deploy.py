"""The ``deploy`` and ``site`` commands."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Annotated, Literal

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
    """Make the authority and the server's kit, and check that the recipe can be deployed.

    Sites make their own keys: each runs 'fedcustom site request NAME', and 'fedcustom deploy sign' answers.

    Example: fedcustom deploy init recipe.toml --sites north,south --server fl.example.org
    """
    from ..deployment.nvflare.kits import provision, require_nvflare
    from ..deployment.parties import check_deployable
    from ..deployment.settings import FederationSettings, save_federation
    from ..deployment.site.template import write_site_template
    from ..recipe.recipe import load_recipe

    names = [name.strip() for name in sites.split(",") if name.strip()]
    checked = load_recipe(recipe, overrides or [])

    from ..federated.resolve import resolved

    complete = resolved(checked)
    check_deployable(complete)
    if folder.exists() and any(folder.iterdir()):
        raise DeploymentError(f"{folder}: is not empty; name another --federation")
    require_nvflare()
    provision(folder, server, port, names, site_kits=False)
    save_federation(folder, FederationSettings(server=server, port=port, sites=names))
    for name in names:
        write_site_template(folder / "sites" / name, complete)
    from ..deployment.nvflare.authority import authority_certificate
    from ..deployment.nvflare.certificates import colons

    deployed = command_line("deploy", "run", recipe, overrides=overrides, options={"--federation": folder})
    signed = command_line("deploy", "sign", "NAME.request.zip", options={"--federation": folder})
    fingerprint = colons(authority_certificate(folder).fingerprint)
    out_console.print(
        f"authority {fingerprint}\nKeep {folder / 'authority'} to yourself: its key lets sites in.\n"
        f"Send each site ({', '.join(names)}) its file in {folder / 'sites'}: a site.toml to complete.\n"
        "It runs: fedcustom site request NAME\n"
        f"and sends you NAME.request.zip. You run: {signed}\n"
        "and send back NAME.signed.zip. The site runs: fedcustom site install NAME NAME.signed.zip\n"
        "and: fedcustom site start NAME --data site.toml\n"
        f"Then you run: {deployed}",
        soft_wrap=True,
    )  # fmt: skip


@deploy.command()
def run(
    recipe: RecipeFile,
    folder: Folder = Path("federation"),
    out: Out = None,
    overrides: Overrides = None,
    resume: Resume = False,
    data_changed: Annotated[
        Literal["refuse", "accept"],
        typer.Option(help="What to do where the server's own rows are not those that the run began with"),
    ] = "refuse",
    quiet: Quiet = False,
) -> None:
    """Start the server on this machine and run a recipe with the sites that are there.

    Example: fedcustom deploy run recipe.toml --federation federation
    """
    from ..recipe.recipe import load_recipe

    checked = load_recipe(recipe, overrides or [])  # before what imports torch

    from .. import api
    from ..deployment.run import run_deployed

    directory = out or api.default_directory(recipe, checked)
    options = {"--federation": folder, "--out": directory, "--resume": True}
    again = command_line("deploy", "run", recipe, overrides=overrides, options=options)
    with display(again, quiet) as make:
        run_deployed(
            checked, folder, directory, resume=resume, callbacks=[make("")], data_changed=data_changed
        )
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
    """Try a deployment out: a server and all sites on this machine, each with a client's part of the data.

    Example: fedcustom deploy local recipes/deploy_trec.toml
    """
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
    """Whether a run is under way, and which sites are connected.

    Example: fedcustom deploy status
    """
    from ..deployment import run as deployed

    found = deployed.status(folder)
    if found["process"] is None:
        out_console.print("no run is under way; the server is started by: fedcustom deploy run")
        return
    out_console.print(f"process {found['process']} drives a run")
    connected = found["connected"]
    for name in found["sites"]:
        state = "unknown (the server does not answer)" if connected is None else "not connected"
        if connected is not None and name in connected:
            state = "connected"
        out_console.print(f"{name}: {state}")


@deploy.command()
def stop(folder: Folder = Path("federation")) -> None:
    """Stop the run that is under way, so that it can be resumed.

    Example: fedcustom deploy stop
    """
    from ..deployment import run as deployed

    said = "the run was told to stop" if deployed.stop(folder) else "no run is under way"
    out_console.print(said)


@site.command()
def start(
    kit: Annotated[Path, typer.Argument(help="This site's start-up kit, a folder")],
    data: Annotated[Path, typer.Option("--data", help="This site's file: data, policy, threads (site.toml)")],
    data_changed: Annotated[
        Literal["refuse", "accept"],
        typer.Option(help="What to do where this site's rows are not those that it began a run with"),
    ] = "refuse",
) -> None:
    """Take part in a federation until stopped (Ctrl-C); what dies meanwhile is started again.

    Example: fedcustom site start north --data site.toml
    """
    from ..deployment.site.process import start_site

    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    start_site(kit, data, _note, stopped.is_set, data_changed=data_changed)


@site.command()
def check(data: Annotated[Path, typer.Option("--data", help="The file to check (site.toml)")]) -> None:
    """Check a site's file and its data: list every setting, what is read, and what the server is told.

    Example: fedcustom site check --data site.toml
    """
    from ..deployment.site.check import site_report
    from ..deployment.site.settings import describe, load_site

    settings = load_site(data)
    lines = list(site_report(settings, data))
    for key, value, default, help_text in describe():
        out_console.print(f"{key} ({value}, default {default}): {help_text}")
    for line in lines:
        out_console.print(line, soft_wrap=True)
    out_console.print(f"{data}: in order")


@site.command()
def cancel(kit: Annotated[Path, typer.Argument(help="This site's start-up kit, a folder")]) -> None:
    """Stop the task that the site is working on; the server is told that it was cancelled.

    Example: fedcustom site cancel north
    """
    from ..deployment.site.process import cancel_task

    cancel_task(kit)
    out_console.print("the task under way, if there is one, is told to stop")


@site.command()
def ledger(kit: Annotated[Path, typer.Argument(help="This site's start-up kit, a folder")]) -> None:
    """Show what the site has answered and sent over all runs, as the limits of its policy count it.

    Example: fedcustom site ledger north
    """
    from ..deployment.nvflare.kits import site_name
    from ..deployment.site.check import ledger_report

    out_console.print(f"site {site_name(kit)}")
    for line in ledger_report(kit):
        out_console.print(line)


def _show(directory: Path, quiet: bool) -> None:
    from ..report import comparison_table, write_report

    page = write_report([directory], directory / "report.html")
    if not quiet:
        out_console.print(comparison_table([directory]))
    out_console.print(f"run: {directory}\nreport: {page}", soft_wrap=True)


def _note(text: str) -> None:
    err_console.print(text, soft_wrap=True)
