"""The ``check`` command."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from .console import Overrides, Quiet, RecipeFile, command_line, display, err_console, json_line, out_console

if TYPE_CHECKING:
    from ..preflight.report import MessageKind, RecipeCheck, Segment, ShownExample
    from ..recipe.recipe import Recipe

MOST_CLIENTS, MOST_LABELS = 10, 8
"""Clients, and labels of each of them, that are printed."""

LONGEST_EXAMPLE = 2000
"""Characters of an example that are printed."""

OPENED, CLOSED = "[[", "]]"
"""What stands around text whose tokens are learnt."""

WIDTH = 22


def check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    examples: Annotated[int, typer.Option(min=0, max=100, help="Training examples that are shown")] = 3,
    no_measure: Annotated[
        bool, typer.Option("--no-measure", help="Leave out memory and time, for which two steps are trained")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON, of a stable layout (docs/start.md)")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Show what a recipe resolves to, before it runs: settings that it leaves open, rows, clients, training
    examples with the learnt tokens between [[ and ]], tokens that are cut, what is sent, what a site's policy
    has to allow, memory and time. Nothing is kept.

    Example: fedcustom check recipes/docstrings.toml
    """
    from ..recipe.recipe import load_recipe

    checked = load_recipe(recipe, overrides or [])  # before what imports torch, which takes seconds

    from ..preflight import check as check_recipe

    with display(command_line("check", recipe, overrides=overrides), quiet) as make:
        told = make("check")
        found = check_recipe(checked, examples=examples, measure=not no_measure, callbacks=told)
    if json:
        print(json_line(found.to_dict()))
    else:
        for name, text in in_words(checked, found):
            out_console.print(f"{name:<{WIDTH}}{text}", soft_wrap=True)
    if found.resources is not None and found.resources.exceeds:
        err_console.print(f"warning: {found.resources.exceeds}", style="yellow", soft_wrap=True)


def in_words(recipe: Recipe, found: RecipeCheck) -> Iterator[tuple[str, str]]:
    """The lines that are shown: names and texts."""
    from ..data.truncation import in_words as cuts_in_words
    from .estimate import in_words as cost_in_words
    from .progress_bar import asked

    settings = found.settings
    task, method = settings["data"]["task"], settings["method"]["name"]
    yield "recipe", f"{settings['baseline']} {method}, {task}, {settings['model']['base']}"
    if found.resources is None:
        yield "run", asked(recipe, found.outline)
    for key, value in found.filled.items():
        if value in (None, 0, []):  # off, as where it is unset
            continue
        yield "filled in", f"{key} = {value!r}"
    parts = ", ".join(f"{count:,} {name}" for name, count in found.rows.items())
    yield "rows", parts + (" (the clients' own test parts)" if found.test_is_pooled else "")
    yield from _clients(found)
    yield "cut", "; ".join(cuts_in_words(found.cuts)) or "nothing"
    for number, example in enumerate(found.examples, start=1):
        yield from _example(number, example)
    if found.examples and (reason := found.inapplicable.get("examples")):
        yield "", reason
    for message in found.messages:
        yield "message", _message(message)
    if reason := found.inapplicable.get("messages"):
        yield "messages", reason
    if reason := found.inapplicable.get("bytes"):
        yield "bytes", reason
    yield from _policy(found)
    if found.resources is not None:
        yield from cost_in_words(recipe, found.resources)
    else:
        yield "memory and time", found.inapplicable["resources"]
    for note in found.notes:
        yield "note", note


def _clients(found: RecipeCheck) -> Iterator[tuple[str, str]]:
    clients = found.clients
    spread = f"{clients.smallest:,} to {clients.largest:,} training examples (median {clients.median:g})"
    yield "clients", f"{clients.count:,} with {spread}"
    if clients.labels:
        yield "labels", _labels(clients.labels, clients.more_labels)
    for client in clients.listed[:MOST_CLIENTS]:
        labels = f"; {_labels(client.labels)}" if client.labels else ""
        sizes = f"{client.train:,} train, {client.development:,} development, {client.test:,} test"
        yield "client", f"{client.name}: {sizes}{labels}"
    if (more := clients.count - min(MOST_CLIENTS, len(clients.listed))) > 0:
        yield "", f"and {more:,} more clients"


def _labels(counts: dict[str, int], more: int = 0) -> str:
    shown = ", ".join(f"{label!r} {count:,}" for label, count in list(counts.items())[:MOST_LABELS])
    left = max(0, len(counts) - MOST_LABELS) + more
    return f"{shown}, and {left} more labels" if left else shown


def _example(number: int, example: ShownExample) -> Iterator[tuple[str, str]]:
    learnt = f", {example.trained} of them learnt" if example.trained else ""
    yield f"example {number}", f"client {example.client}, {example.tokens} tokens{learnt}"
    if example.rejected is None:
        yield "", _marked(example.segments)
    else:
        yield "  chosen", _marked(example.segments)
        yield "  rejected", _marked(example.rejected)
    if example.label is not None:
        yield "  label", repr(example.label)
    if example.document is not None:
        yield "  document", _short(example.document)


def _marked(segments: Sequence[Segment]) -> str:
    return _short("".join(f"{OPENED}{s.text}{CLOSED}" if s.trained else s.text for s in segments))


def _short(text: str) -> str:
    """A text on one line, with the number of characters that are not shown."""
    line = text.replace("\n", "\\n")
    left = len(line) - LONGEST_EXAMPLE
    return f"{line[:LONGEST_EXAMPLE]} ... and {left:,} more characters" if left > 0 else line


def _message(message: MessageKind) -> str:
    from .progress_bar import size

    ways = [f"{size(n)} {way}" for n, way in ((message.down, "down"), (message.up, "up")) if n is not None]
    bytes_ = f"; {', '.join(ways)} a client" if ways else ""
    return (
        f"{message.kind!r}: {message.asks}. Answer: {message.answer}; may hold {', '.join(message.contents)}"
        f"{bytes_}"
    )


def _policy(found: RecipeCheck) -> Iterator[tuple[str, str]]:
    import json

    if reason := found.inapplicable.get("policy"):
        yield "site's policy", reason
        return
    if found.refused is not None:
        yield "site's policy", f"no site takes part: {found.refused}"
    for need in found.policy:  # lines as they stand in site.toml
        yield "site's policy", f"{need.setting} = {json.dumps(need.value)} is needed: {need.reason}"
    if not found.policy and found.refused is None:
        yield "site's policy", "the defaults of site.toml allow this recipe"
