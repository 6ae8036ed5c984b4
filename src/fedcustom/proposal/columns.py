"""What the columns of a table hold: labels, numbers, texts, identifiers, messages."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..data.cells import NUMBER, Row, place_of, text_of

Kind = Literal[
    "empty", "constant", "category", "number", "date", "identifier", "text", "messages", "container"
]

DATE = re.compile(r"\d{4}-\d{2}-\d{2}([T ].*)?|\d{1,2}[./]\d{1,2}[./](\d{4}|\d{2})")
INTEGER = re.compile(r"[+-]?\d+(\.0+)?")

MOST_LABELS = 200
"""Different values up to which a column of texts may be one of labels."""

MOST_NUMBERED = 30
"""Different values up to which a column of whole numbers may be one of labels."""

LABEL_WORDS = 6
"""Words of a label at most, on average."""

WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


@dataclass(frozen=True)
class Column:
    """What one column holds.

    Attributes:
        name: its name.
        kind: ``category`` has few different values, each in two rows on average; ``identifier`` has another
            one-word value in nearly every row; ``messages`` are lists of objects with role and content,
            ``container`` other lists and objects.
        rows: how many rows there are.
        missing: how many cells have no value.
        where_missing: the first of them, as ``line 8``.
        distinct: how many different values there are.
        words: mean number of words of a value.
        integral: whether all values are whole numbers.
    """

    name: str
    kind: Kind
    rows: int
    missing: int = 0
    where_missing: str = ""
    distinct: int = 0
    words: float = 0.0
    integral: bool = False

    def named(self, words: Iterable[str]) -> bool:
        """Whether a word of the column's name is among these (``userId`` has ``user`` and ``id``)."""
        return bool({part.lower() for part in WORD.findall(self.name)} & set(words))

    @property
    def problem(self) -> str | None:
        """Why the column cannot be read in every row, as the rest of a sentence; None where it can."""
        if self.missing:
            return f"is empty in {self.missing} of {self.rows} rows (the first: {self.where_missing})"
        return None


def profile(rows: Sequence[Mapping[str, Any]]) -> dict[str, Column]:
    """The columns of a table by name, in its order."""
    return {name: _column(name, rows) for name in (rows[0] if rows else ())}


def _column(name: str, rows: Sequence[Mapping[str, Any]]) -> Column:
    values, missing, where = list[str](), 0, ""
    containers = conversations = 0
    for position, row in enumerate(rows):
        value = row.get(name)
        if isinstance(value, list | tuple | np.ndarray | Mapping | bytes):
            containers += 1
            conversations += _is_conversation(value)
            continue
        try:
            text = text_of(value)
        except ValueError:
            text = ""
        if text.strip():
            values.append(text)
        else:
            missing += 1
            where = where or place_of(row if isinstance(row, Row) else dict(row), position)
    common: dict[str, Any] = {"rows": len(rows), "missing": missing, "where_missing": where}
    if containers:
        return Column(name, "messages" if conversations == containers else "container", **common)
    if not values:
        return Column(name, "empty", **common)
    counts = Counter(values)
    integral = all(INTEGER.fullmatch(value) for value in counts)
    words = sum(len(value.split()) * count for value, count in counts.items()) / len(values)
    kind = _kind(counts, len(values), words, integral=integral)
    return Column(name, kind, distinct=len(counts), words=words, integral=integral, **common)


def _is_conversation(value: object) -> bool:
    return (
        isinstance(value, list | tuple | np.ndarray)
        and len(value) > 0
        and all(isinstance(one, Mapping) and {"role", "content"} <= one.keys() for one in value)
    )


def _kind(counts: Counter[str], rows: int, words: float, *, integral: bool) -> Kind:
    distinct = len(counts)
    if distinct == 1 and rows > 1:
        return "constant"
    if all(DATE.fullmatch(value) for value in counts):
        return "date"
    if all(NUMBER.fullmatch(value) for value in counts):
        few = integral and distinct <= MOST_NUMBERED and 2 * distinct <= rows
        return "category" if few else "number"
    if distinct <= MOST_LABELS and 2 * distinct <= rows and words <= LABEL_WORDS:
        return "category"
    return "identifier" if words <= 1.2 and distinct >= 0.5 * rows else "text"
