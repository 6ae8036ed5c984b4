"""Shared parts of the commands: consoles, options, and the resume hint after Ctrl-C."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ..core.text import printable


class PlainConsole(Console):
    """A console that shows text as it is: no markup in it, and nothing in it that a terminal would obey.
    Names, texts and errors of clients come here.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, highlight=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """As of any console, of a text whose control characters are escaped."""
        return super().render_str(printable(text), **options)


err_console = PlainConsole(stderr=True)
# A pipe or file has no width of its own; tables need more than the 80 columns that rich would take.
out_console = PlainConsole() if sys.stdout.isatty() else PlainConsole(width=120)


def note(text: str) -> None:
    """Print a line that is no result."""
    err_console.print(text, soft_wrap=True)


def write_any_text() -> None:
    """Let standard output and error take every text, whatever their encoding: characters that it lacks are
    escaped, so that a finished run does not fail by its last line.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def json_line(value: Any) -> str:
    """A value as one line of JSON, in characters that standard output can write."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


RecipeFile = Annotated[
    Path, typer.Argument(help="The recipe, a TOML file (see: fedcustom recipe --help-all)")
]
RunDirectory = Annotated[Path, typer.Argument(help="A run's directory")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one setting, e.g. --set training.batch_size=32; KEY=unset takes one back; repeatable",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show warnings and the result alone")]
NoCheck = Annotated[
    bool,
    typer.Option(
        "--no-check",
        help="Do not load the written model in a fresh process to compare its outputs with the trained one's",
    ),
]


def command_line(
    *words: object, options: Mapping[str, object] | None = None, overrides: Sequence[str] | None = None
) -> str:
    """A command of this package as it can be pasted into a shell.

    Args:
        words: The command's name and its arguments.
        options: Options by name. One that is None is left out; True stands for a flag, and a list for an
            option that is given once for each of its elements.
        overrides: The values of ``--set``.
    """
    parts = ["fedcustom", *map(str, words)]
    for name, value in {"--set": list(overrides or []), **(options or {})}.items():
        if value is True:
            parts.append(name)
        elif value is not None and value is not False:
            for one in value if isinstance(value, list) else [value]:
                parts += [name, str(one)]
    return shlex.join(parts)


@contextlib.contextmanager
def display(command: str, quiet: bool) -> Iterator[Any]:
    """Makes displays; takes the last one down at the end, and says how to go on after Ctrl-C."""
    from .progress_bar import ProgressDisplay

    shown: list[ProgressDisplay] = []

    def make(name: str) -> ProgressDisplay:
        for display in shown:
            display.close()
        shown.append(ProgressDisplay(err_console, name, quiet=quiet))
        return shown[-1]

    try:
        yield make
    except KeyboardInterrupt:
        for display in shown:
            display.close()
        err_console.print(f"stopped; go on with: {command}", soft_wrap=True)
        raise typer.Exit(130) from None
    finally:
        for display in shown:
            display.close()
