"""Inputs of ``predict`` from a file or standard input, and an answer for each of them in order."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..api import Run
from ..core.errors import DataError
from ..data.cells import Row
from ..data.files import not_utf8, read_file
from ..data.templates import fields
from ..data.truncation import in_words

DECIMALS = 4
"""Decimals of a printed probability."""


def answers(run: Run, path: Path, note: Callable[[str], None]) -> list[dict[str, Any]]:
    """One answer for each line of a text file (``.txt``, ``-``) or each row of another file, in order.

    A blank line of a text file is no input: its answer is null, and ``note`` is told how many there are. So
    is how many answers are empty.

    Raises:
        DataError: the file cannot be read, holds nothing, or a row of it would be refused in training too;
            names file, line and column.
    """
    is_text = str(path) == "-" or path.suffix == ".txt"
    inputs = _lines(path, run) if is_text else read_file(path)
    if not inputs:
        raise DataError(f"{path}: is empty")
    asked = [item for item in inputs if item is not None]
    try:
        found = iter(run.predict(asked))
    except DataError as error:
        raise DataError(f"{path}, {error}") from None
    note_cuts(run, asked, note)
    given = [_no_answer(run) if item is None else _readable(next(found)) for item in inputs]
    blank = [number for number, item in enumerate(inputs, start=1) if item is None]
    if blank:
        note(f"{path}: {len(blank)} blank lines have null for an answer (the first is line {blank[0]})")
    empty = [number for number, answer in enumerate(given, start=1) if is_empty(answer)]
    if empty:
        note(
            f"{len(empty)} of {len(given)} answers are empty (the first is number {empty[0]}): {reason(run)}"
        )
    return given


def note_cuts(run: Run, inputs: Sequence[str | Mapping[str, Any]], note: Callable[[str], None]) -> None:
    """Say how many of the inputs that were predicted are cut, if any, and what else the method cut."""
    found = run.count_cuts(inputs)
    for sentence in in_words({"given": found}):
        note(sentence)
    for sentence in run.take_cuts():
        note(sentence)


def is_empty(answer: Mapping[str, Any]) -> bool:
    """Whether a generator wrote nothing but space."""
    text = answer.get("text")
    return isinstance(text, str) and not text.strip()


def reason(run: Run) -> str:
    """The likely reason of an empty answer, in words."""
    ended = "the model ended its text before it wrote a word"
    if run.recipe.data.task in ("chat", "preference"):
        return ended
    if getattr(run.tokenizer(), "chat_template", None):
        return (
            f"{ended}; it is an instruct model, and data.prompt = {run.recipe.data.prompt!r} may "
            "lack the template of its conversations"
        )
    return f"{ended}; the prompt is {run.recipe.data.prompt!r} with the input in it, as in training"


def _lines(path: Path, run: Run) -> list[Row | None]:
    """The lines of a text, which end at line feeds alone; None for a blank one."""
    content = _standard_input() if str(path) == "-" else path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise not_utf8(str(path), content) from None
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()  # what ends with a line feed has no further line
    data = run.recipe.data
    template = data.text if data.task == "classification" else data.prompt
    names = set(fields(template))
    if len(names) != 1:
        raise DataError(f"{path}: the recipe's template {template!r} needs columns, not a text a line")
    (column,) = names
    rows = (Row({column: line.removesuffix("\r")}, f"line {n}") for n, line in enumerate(lines, start=1))
    return [row if row[column].strip() else None for row in rows]


def _standard_input() -> bytes:
    binary = getattr(sys.stdin, "buffer", None)
    content: bytes = binary.read() if binary else sys.stdin.read().encode("utf-8")
    return content


def _no_answer(run: Run) -> dict[str, Any]:
    generates = run.recipe.data.task != "classification"
    return dict.fromkeys(("text",) if generates else ("label", "probability", "probabilities"))


def _readable(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer with probabilities of four decimals."""
    if "label" not in answer:
        return answer
    shares = {label: round(share, DECIMALS) for label, share in answer["probabilities"].items()}
    return answer | {"probability": round(answer["probability"], DECIMALS), "probabilities": shares}
