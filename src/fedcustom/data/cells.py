"""Rows as they are read, and the one text of each cell."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from datetime import date, time
from decimal import Decimal
from typing import Any

import numpy as np

from ..core.errors import DataError

SURROGATE = re.compile("[\ud800-\udfff]")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
MISSING = ("NAType", "NaTType")
"""The types of pandas' marks for a missing value; pandas itself is not imported to read a cell."""


class Row(dict[str, Any]):
    """One row by column, and where in its file it stands: ``line 8`` of a text file, ``row 8`` of others."""

    __slots__ = ("place",)

    def __init__(self, values: Mapping[str, Any] | Iterable[tuple[str, Any]], place: str) -> None:
        super().__init__(values)
        self.place = place

    def only(self, columns: Iterable[str]) -> Row:
        """The same row with no other columns than these."""
        return Row(((name, self[name]) for name in columns if name in self), self.place)


def place_of(row: Mapping[str, Any], position: int) -> str:
    """Where a row stands: as it was read, or its position (from 0) as ``row 1``."""
    return row.place if isinstance(row, Row) else f"row {position + 1}"


def text_of(value: object) -> str:
    """The text of a value. It is the same whether the value came from JSON, CSV or Parquet.

    Texts stay as they are. Numbers, ``True`` and ``False`` are written as Python and its ``csv`` module write
    them, with the fewest digits that give the number again; dates and times as in ISO 8601, with a space.

    Raises:
        ValueError: the value has no one text. The message completes a sentence: ``is empty``, ``is not a
            finite number``, ``is not UTF-8 text``, ``holds a list ...``.
    """
    if isinstance(value, str):
        if value == "":
            raise ValueError("is empty")
        if SURROGATE.search(value):
            raise ValueError("is not UTF-8 text (it holds half of a surrogate pair)")
        return str(value)
    if value is None or type(value).__name__ in MISSING:
        raise ValueError("is empty")
    if isinstance(value, np.floating | float | Decimal):
        if math.isnan(value):
            raise ValueError("is NaN, which stands for a missing value")
        if math.isinf(value):
            raise ValueError("is not a finite number")
        return repr(float(value)) if isinstance(value, float) else str(value)  # float32 has fewer digits
    if isinstance(value, bool | int | np.bool_ | np.integer | date | time):
        return str(value)
    raise ValueError(f"{_contents(value)}, not a text, a number or true/false")


def _contents(value: object) -> str:
    """What a value that is no plain one holds, and what to do about it."""
    if isinstance(value, list | tuple | np.ndarray):
        if len(value) and all(isinstance(one, Mapping) and "content" in one for one in value):
            return (
                "holds a list of messages: set data.task = 'chat', or write the prompt and the answer to "
                "columns of their own, such as {prompt} and {completion}; a template takes a plain value"
            )
        return (
            "holds a list: write what is wanted of it to a column of its own; a template takes a plain value"
        )
    kind = "object" if isinstance(value, Mapping) else type(value).__name__
    return f"holds {'an' if kind == 'object' else 'a value of type'} {kind}: a cell must hold a plain value"


def cell_text(row: Mapping[str, Any], column: str, where: str) -> str:
    """The text of one cell; ``where`` names file and line.

    Raises:
        DataError: the cell has no one text (:func:`text_of`), or there is no such column.
    """
    if column not in row:
        raise DataError(f"{where}: no column {column!r}")
    try:
        return text_of(row[column])
    except ValueError as error:
        raise DataError(f"{where}: column {column!r} {error}") from None


def cell_texts(row: Mapping[str, Any], column: str, where: str) -> tuple[str, ...]:
    """The texts of a cell that holds one, or a list of them.

    Raises:
        DataError: the list is empty, or something in it has no one text.
    """
    value = row.get(column)
    values = list(value) if isinstance(value, list | tuple | np.ndarray) else [value]
    try:
        texts = tuple(text_of(one) for one in values)
    except ValueError as error:
        raise DataError(f"{where}: column {column!r} must hold a text or a list of texts: {error}") from None
    if not texts:
        raise DataError(f"{where}: column {column!r} must hold a text or a list of texts: the list is empty")
    return texts


def in_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Labels, each once: in the order of numbers where all are numbers, else in that of texts.

    The texts decide, so that the order is that of the data and not of the file's kind. ``7`` and ``07`` are
    two labels.
    """
    distinct = sorted(set(labels))
    if all(NUMBER.fullmatch(label) and label.isascii() for label in distinct):
        distinct.sort(key=float)
    return tuple(distinct)


def class_name(value: int | None, names: list[str], where: str) -> str | None:
    """The name of a numbered class of ``datasets``; None where it is missing or -1, which marks no label.

    Raises:
        DataError: there is no class of that number.
    """
    if value is None or value == -1:
        return None
    if not 0 <= value < len(names):
        raise DataError(f"{where} holds {value}, which is none of its {len(names)} classes")
    return names[value]
