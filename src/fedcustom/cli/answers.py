"""Commands that ask a customised model, or the clients' documents."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import DataError
from .console import Overrides, RecipeFile, RunDirectory, json_line, note, out_console


def predict(
    directory: RunDirectory,
    text: Annotated[str | None, typer.Argument(help="One input")] = None,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input",
            help="Inputs: JSONL, CSV or Parquet with the recipe's columns (conversations: messages), or a "
            "text a line (.txt, -)",
        ),
    ] = None,
) -> None:
    """Ask the customised model: one text, or a file; a file's answers are JSON, a line each in the file's
    order, with probabilities of four decimals. A blank line of a text file has null for an answer. Of a
    model of conversations, a text is one turn of a user.

    Example: fedcustom predict runs/first "The room was cold."
    """
    from .. import api
    from .predictions import answers, is_empty, note_cuts, reason

    if (text is None) == (input_file is None):
        raise DataError("give either one text or --input FILE")
    finished = api.load(directory)
    if text is not None:
        answer = finished.predict([text])[0]
        note_cuts(finished, [text], note)
        if "label" in answer:
            out_console.print(f"{answer['label']}  {answer['probability']:.3f}")
        else:
            out_console.print(answer["text"], soft_wrap=True)
        if is_empty(answer):
            note(f"the answer is empty: {reason(finished)}")
        return
    assert input_file is not None
    for answer in answers(finished, input_file, note):
        print(json_line(answer))


def chat(directory: RunDirectory) -> None:
    """Talk to a model that was customised on conversations. Answers appear as they are written, and the
    conversation is kept: /reset forgets it; /quit or Ctrl-D ends. Where standard input is no terminal, each
    line of it is a turn, and answers alone are printed.

    Example: fedcustom chat runs/assistant
    """
    from .. import api
    from .chat import converse

    converse(api.load(directory), note)


def index(
    recipe: RecipeFile,
    out: Annotated[Path, typer.Option(help="Folder of the index; one that is there is updated")],
    overrides: Overrides = None,
) -> None:
    """Build or update the clients' document indexes of a retrieval recipe.

    Example: fedcustom index recipes/medquad.toml --out indexes/medquad
    """
    from .. import library

    found = library.index(recipe, out, overrides or [], note=note)
    for name, documents in sorted(found.items()):
        out_console.print(f"{name}: {documents} documents")
    out_console.print(f"index: {out}", soft_wrap=True)


def ask(
    directory: Annotated[Path, typer.Argument(help="An index, or a run of method retrieval")],
    question: Annotated[str, typer.Argument(help="The question")],
    top: Annotated[int | None, typer.Option(min=1, help="Passages to show (default: the recipe's)")] = None,
) -> None:
    """Ask the clients' documents: passages with their owners and scores, and an answer.

    Example: fedcustom ask runs/medquad "What is gout?"
    """
    from .. import library

    reply = library.ask(directory, question, top=top, note=note)
    for number, passage in enumerate(reply.passages, start=1):
        out_console.print(
            f"[{number}] {passage.client}  {passage.score:.4f}  {passage.document}",
            style="bold",
        )  # fmt: skip
        text = "(its owner does not show it)" if passage.text is None else " ".join(passage.text.split())
        out_console.print(f"    {text}")
    if reply.answer:
        cited = " ".join(f"[{number}]" for number in reply.cited)
        out_console.print(f"answer: {reply.answer} {cited}".rstrip())
    asked = ", ".join(reply.clients_asked)
    out_console.print(
        f"asked: {asked}; {reply.bytes_down:,} bytes down, {reply.bytes_up:,} bytes up",
    )  # fmt: skip
