"""The ``estimate`` command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .console import Overrides, Quiet, RecipeFile, command_line, display, err_console, json_line, out_console

if TYPE_CHECKING:
    from ..federated.resources import Resources
    from ..recipe.recipe import Recipe


def estimate(
    recipe: RecipeFile,
    overrides: Overrides = None,
    json: Annotated[bool, typer.Option("--json", help="Print one line of JSON")] = False,
    quiet: Quiet = False,
) -> None:
    """Estimate what a recipe needs before it runs: parameters, bytes, memory, and time by two measured steps
    of the clients of a round.

    Example: fedcustom estimate recipes/docstrings.toml
    """
    from ..recipe.recipe import load_recipe

    checked = load_recipe(recipe, overrides or [])  # before what imports torch, which takes seconds

    from ..federated.resources import measure_resources

    with display(command_line("estimate", recipe, overrides=overrides), quiet) as make:
        found = measure_resources(checked, make("estimate"))
    if json:
        print(json_line(found.to_dict()))
    else:
        for name, text in in_words(checked, found):
            out_console.print(f"{name:<22}{text}", soft_wrap=True)
    if found.exceeds:
        err_console.print(f"warning: {found.exceeds}", style="yellow", soft_wrap=True)


def in_words(recipe: Recipe, found: Resources) -> list[tuple[str, str]]:
    """The lines that are shown: names and figures."""
    from ..federated.resolve import resolved
    from .progress_bar import asked, duration, size

    recipe = resolved(recipe).settled(found.outline.clients)
    head = f" and {found.head:,} of the head" if found.head else ""
    lines = [
        ("run", asked(recipe, found.outline)),
        ("model", f"{found.parameters:,} parameters, {size(found.model_bytes)}"),
        ("trained", f"{found.trained:,} numbers{head}"),
        ("memory of a client", f"about {size(found.client_bytes)}, the process in which it trains alone"),
        ("memory of a server", f"about {size(found.server_bytes)}, across sites"),
        ("memory here", f"{size(found.process_bytes)} at most; {size(found.available_bytes)} available"),
    ]
    if found.round_seconds is None or found.run_seconds is None:
        return [*lines, ("time", "no round trains")]
    one = duration(found.round_seconds) if found.round_seconds >= 1 else "under 1 s"
    rounds = f"a round trains for {one}, all for {duration(found.run_seconds)}"
    return [*lines, ("time here", f"{rounds}, by measured steps; {_unmeasured(recipe)} come to that")]


def _unmeasured(recipe: Recipe) -> str:
    """What takes time besides the steps of rounds."""
    found = ["evaluations"]
    if recipe.training.trials():
        found.append("the search of a learning rate")
    if recipe.training.rounds_of_head_fits(recipe.rounds.count):
        found.append("fits of the head")
    if recipe.personalisation.finetune_epochs:
        found.append("the clients' fine-tuning")
    return " and ".join([", ".join(found[:-1]), found[-1]] if found[1:] else found)
