"""The ``new`` command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.errors import FedcustomError
from .console import command_line, err_console, note, out_console

if TYPE_CHECKING:
    from ..proposal import Question


def new(
    data: Annotated[
        str,
        typer.Argument(
            help="JSONL, JSON, CSV or Parquet; a folder of such files; a hub id; builtin:docstrings"
        ),
    ],
    out: Annotated[Path, typer.Option(help="The recipe's file")] = Path("recipe.toml"),
    yes: Annotated[
        bool,
        typer.Option("--yes", "-y", help="Ask nothing: take what the data suggest (no terminal is needed)"),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the recipe's file")] = False,
    task: Annotated[
        str | None, typer.Option(help="classification, generation, chat, preference or retrieval")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Classification: column of the input, or a template: '{title}. {body}'")
    ] = None,
    label: Annotated[str | None, typer.Option(help="Classification: column of the label")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Column or template of the prompt; retrieval: of the question")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Column or template of what is to be written; retrieval: of the document"),
    ] = None,
    client: Annotated[
        str | None,
        typer.Option(help="Column that says whose a row is; none: rows are assigned to clients at random"),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model: built in, a hub id or a folder")] = None,
    train: Annotated[str | None, typer.Option(help="Training split, where several are there")] = None,
    subset: Annotated[
        str | None, typer.Option(help="Configuration of a hub data set that has several")
    ] = None,
) -> None:
    """Propose a recipe for data, and write it: the task by columns and values, clients by a column that says
    whose a row is, lengths by the tokens of the data, a base model that fits into the memory of this machine.
    On a terminal each choice is asked; Enter takes the proposal. The recipe is checked as a run would check
    it before it is written.

    Example: fedcustom new reviews.csv --out reviews.toml
    """
    if not yes and not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise FedcustomError("there is no terminal to ask on: add --yes to take what the data suggest")

    from ..data.truncation import in_words
    from ..proposal import Choices, propose
    from ..proposal.questions import take_proposals
    from ..proposal.write import refuse_existing, write_proposal

    refuse_existing(out, force=force)
    choices = Choices(task, text, label, prompt, target, client, base, train, subset)
    proposal = propose(data, choices, take_proposals if yes else ask)
    checked = write_proposal(proposal, out, force=force)
    for text_ in (*proposal.notes, *in_words(checked.cuts)):
        note(text_)
    parts = ", ".join(f"{count} {name}" for name, count in checked.rows.items())
    out_console.print(
        f"recipe: {out} ({proposal.task}, {checked.clients} clients; rows: {parts})", soft_wrap=True
    )
    out_console.print(f"next: {command_line('check', out)}; {command_line('run', out)}", soft_wrap=True)


def ask(question: Question) -> str:
    """The answer of a user at the terminal; Enter takes the proposal, where there is one."""
    if question.proposal is None:
        note(question.reason)
    others = [answer for answer in question.candidates if answer != question.proposal]
    listed = f" (or: {', '.join(others[:12])}{', ...' * (len(others) > 12)})" if others else ""
    while True:
        shown = None if question.proposal is None else _escaped(question.proposal)
        found = str(typer.prompt(f"{question.text}{listed}", default=shown, err=True)).strip()
        answer = found.replace("\\n", "\n")
        if question.allows(answer):
            return answer
        err_console.print(
            f"{found!r} is no answer; allowed: {', '.join(question.candidates)}", soft_wrap=True
        )


def _escaped(text: str) -> str:
    """A template on one line."""
    return text.replace("\n", "\\n")
