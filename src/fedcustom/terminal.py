"""What commands share: consoles, arguments, and a display that says how to go on after Ctrl-C."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

err_console = Console(stderr=True)
# A pipe or file has no width of its own; tables need more than the 80 columns that rich would take.
out_console = Console() if sys.stdout.isatty() else Console(width=120)

RecipeFile = Annotated[
    Path, typer.Argument(help="The recipe, a TOML file (see: fedcustom recipe --help-all)")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change one setting, e.g. --set training.batch_size=32; repeatable"
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show warnings and the result alone")]


@contextlib.contextmanager
def display(command: str, quiet: bool) -> Iterator[Any]:
    """Makes displays; takes the last one down at the end, and says how to go on after Ctrl-C."""
    from .display import Display

    shown: list[Display] = []

    def make(name: str) -> Display:
        for display in shown:
            display.close()
        shown.append(Display(err_console, name, quiet=quiet))
        return shown[-1]

    try:
        yield make
    except KeyboardInterrupt:
        for display in shown:
            display.close()
        err_console.print(f"stopped; go on with: {command}", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(130) from None
    finally:
        for display in shown:
            display.close()
