"""The ``watch`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import RunError
from .console import err_console, out_console


def watch(
    runs: Annotated[
        list[Path], typer.Argument(help="Run directories, or folders that hold some; they may be yet to come")
    ],
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on this machine's loopback interface; 0: a free one")
    ] = 0,
    open_: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser")] = True,
) -> None:
    """Watch runs in a browser while they run: curves, clients, bytes, warnings and the sites of a deployed
    run. The page is served to this machine alone.

    Example: fedcustom watch runs/first --port 8400 --no-open
    """
    for place in runs:
        if place.exists() and not place.is_dir():
            raise RunError(f"{place}: is a file; name a run's directory, or a folder of runs")

    from ..watch.server import WatchServer

    try:
        server = WatchServer(runs, port)
    except OSError as error:
        raise RunError(f"--port {port}: {error.strerror or error}; 0 takes a free one") from None
    try:
        with server:
            names = ", ".join(map(str, runs))
            out_console.print(f"watching {names}: {server.url} (Ctrl-C ends it)", soft_wrap=True)
            if open_:
                _open(server.url)
            server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        err_console.print("stopped watching; the runs go on", soft_wrap=True)


def _open(url: str) -> None:
    """Open a page in the browser of this machine, if it has one."""
    import webbrowser

    try:
        opened = webbrowser.open(url)
    except webbrowser.Error:
        opened = False
    if not opened:
        err_console.print("no browser to open was found; --no-open does not look for one", soft_wrap=True)
