"""The ``privacy`` command."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import typer

from .console import Overrides, RecipeFile, json_line, out_console


def privacy(
    recipe: RecipeFile,
    overrides: Overrides = None,
    json: Annotated[bool, typer.Option("--json", help="Print one line of JSON")] = False,
) -> None:
    """Say what a recipe promises of privacy, before anything is loaded: to whom, on which assumptions, at how
    much noise.

    Example: fedcustom privacy recipes/trec_private.toml
    """
    from ..core.errors import RecipeError
    from ..recipe.recipe import load_recipe

    checked = load_recipe(recipe, overrides or [])  # before what imports torch, which takes seconds
    if checked.privacy is None or checked.privacy.unit == "none":
        raise RecipeError(
            f"{recipe}: promises no privacy, for it has no [privacy] section with a unit; whoever runs the "
            "server sees what each client sends"
        )

    from ..data.build import build_data, with_builtin_columns
    from ..federated.example_run import example_run
    from ..federated.private_run import count_clients, planned
    from ..federated.resolve import resolved
    from ..privacy.example_record import example_record, example_words
    from ..privacy.record import client_record
    from ..privacy.words import client_words

    complete = resolved(checked)
    if (section := complete.example_privacy) is not None:
        settings, clients_ = with_builtin_columns(complete.data, complete.clients)
        hidden = example_run(complete, build_data(settings, clients_, complete.seed, complete.public))
        assert hidden is not None
        if json:
            print(json_line(example_record(section, hidden.mechanisms, {})))
            return
        _print(example_words(section, hidden.mechanisms))
        return
    clients = count_clients(complete)
    mechanism = planned(complete.settled(clients), clients)
    assert mechanism is not None
    if json:
        print(json_line(client_record(mechanism)))
        return
    _print(client_words(mechanism))


def _print(lines: Iterable[tuple[str, str]]) -> None:
    for name, text in lines:
        out_console.print(f"{name:<18}{text}", soft_wrap=True)
