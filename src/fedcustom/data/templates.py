"""Templates: how the columns of a row become one text."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from ..core.errors import DataError

MAX_CHARACTERS, MAX_FIELDS = 100_000, 100
"""Longest template, and most columns that it names: one text must not grow with the template alone."""

PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+")

FORMATTED = re.compile(r"(?P<name>[^\W\d]\w*)(?P<how>![rsa])?(?P<spec>:(.?[<>=^])?[-+ ]?[\d#,._]*\w?)?")
"""A name with a conversion or a specification, as in Python's format strings."""

INDEXED = re.compile(r"(?P<name>[^\W\d]\w*)(?=.*\[\d+\]|(\[[^\]]*\]){2})(\[[^\]]*\]|\.\w+)+")
"""A name with indices into a list or an object of lists."""


class Field(NamedTuple):
    """A column's text in a filled template: characters ``start`` to ``end``."""

    name: str
    start: int
    end: int


def fields(template: str) -> tuple[str, ...]:
    """The columns that a template names, in their order.

    The text between two braces is a column's name, whatever it is: ``{Review Text}``, ``{a.b}``, ``{0}``.
    Doubled braces are braces. Nothing else has a meaning: a format specification (``{text:>9}``) could make
    one short value a text of gigabytes, a conversion (``{text!r}``) is code of the value's type, and an index
    (``{messages[0]}``) picks from a list, which is no plain value.

    Raises:
        DataError: the template is not one (an unpaired brace, no name between braces), has a format
            specification, a conversion or an index, or is longer than any prompt.
    """
    return tuple(name for _, name in _parsed(template) if name is not None)


def fill(template: str, values: Mapping[str, str]) -> str:
    """A template with each column's text in its place; doubled braces become single ones."""
    return "".join(literal if name is None else values[name] for literal, name in _parsed(template))


def places(template: str, values: Mapping[str, str]) -> tuple[Field, ...]:
    """Where each column's text stands in what :func:`fill` returns, in their order."""
    return _places(template, tuple(len(values[name]) for name in fields(template)))


@functools.lru_cache(4096)  # many examples of a data set are equally long and share the result
def _places(template: str, lengths: tuple[int, ...]) -> tuple[Field, ...]:
    found, at, rest = list[Field](), 0, iter(lengths)
    for literal, name in _parsed(template):
        length = len(literal) if name is None else next(rest)
        if name is not None:
            found.append(Field(name, at, at + length))
        at += length
    return tuple(found)


@functools.lru_cache(64)
def _parsed(template: str) -> tuple[tuple[str, str | None], ...]:
    """A template's pieces: literal texts, and columns' names."""
    shown = f"template {template[:100]!r}"
    if len(template) > MAX_CHARACTERS:
        raise DataError(f"{shown}: {len(template)} characters; at most {MAX_CHARACTERS} are allowed")
    pieces = tuple(_pieces(template, shown))
    count = sum(name is not None for _, name in pieces)
    if count > MAX_FIELDS:
        raise DataError(f"{shown}: names {count} columns; at most {MAX_FIELDS} are allowed")
    return pieces


def _pieces(template: str, shown: str) -> Iterator[tuple[str, str | None]]:
    for match in PIECE.finditer(template):
        piece, name = match[0], match[1]
        if name is not None:
            _refuse_more_than_a_name(name, shown)
            yield "", name
        elif piece in ("{", "}"):
            if re.match(r"\{[^{}]*:[^{}]*\{", template[match.start() :]):
                raise DataError(
                    f"{shown}: a format specification is not allowed; write a column's name alone"
                )
            raise DataError(f"{shown}: a single {piece!r}; write {{{{ and }}}} for literal braces")
        else:
            yield {"{{": "{", "}}": "}"}.get(piece, piece), None


def _refuse_more_than_a_name(name: str, shown: str) -> None:
    if not name.strip():
        raise DataError(f"{shown}: name a column between braces, as in {{text}}")
    found = FORMATTED.fullmatch(name)
    has_spec = found and found["spec"] and re.search(r"[<>=^\d]", found["spec"])
    if found and (found["how"] or has_spec):
        raise DataError(
            f"{shown}: {{{name}}} has a format specification or a conversion; write {{{found['name']}}} alone"
        )
    if found := INDEXED.fullmatch(name):
        raise DataError(
            f"{shown}: {{{name}}} picks from the list or object in {found['name']!r}; name a column of plain "
            "values: write what the template needs to columns of their own, such as {prompt} and {completion}"
        )


def checked(template: str | None) -> str | None:
    """A template of a settings file, once :func:`fields` has found nothing wrong with it.

    Raises:
        ValueError: see :func:`fields`.
    """
    if template is not None:
        try:
            fields(template)
        except DataError as error:
            raise ValueError(str(error)) from None
    return template
