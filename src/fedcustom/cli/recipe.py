"""The ``recipe`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .console import Overrides, out_console


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
