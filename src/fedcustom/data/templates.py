"""Templates: how the columns of a row become one text."""

from __future__ import annotations

import string

from ..core.errors import DataError

MAX_CHARACTERS, MAX_FIELDS = 100_000, 100
"""Longest template, and most columns that it names: one text must not grow with the template alone."""


def fields(template: str) -> tuple[str, ...]:
    """The columns that a template names, in their order.

    A field is a column's name and nothing else. A format specification (``{text:>9}``) could make one short
    value a text of gigabytes, and a conversion (``{text!r}``) is code of the value's type.

    Raises:
        DataError: the template is not one (an unpaired brace, a positional field, an attribute), has a format
            specification or a conversion, or is longer than any prompt.
    """
    shown = f"template {template[:100]!r}"
    if len(template) > MAX_CHARACTERS:
        raise DataError(f"{shown}: {len(template)} characters; at most {MAX_CHARACTERS} are allowed")
    try:
        parsed = [(name, spec, how) for _, name, spec, how in string.Formatter().parse(template)]
    except ValueError as error:
        raise DataError(f"{shown}: {error}; write {{{{ and }}}} for literal braces") from None
    named = [(name, spec, how) for name, spec, how in parsed if name is not None]
    for name, spec, how in named:
        if not name.isidentifier():
            raise DataError(f"{shown}: name a column between braces, as in {{text}}")
        if spec or how:
            raise DataError(
                f"{shown}: {{{name}}} has a format specification or a conversion; write {{{name}}} alone"
            )
    if len(named) > MAX_FIELDS:
        raise DataError(f"{shown}: names {len(named)} columns; at most {MAX_FIELDS} are allowed")
    return tuple(name for name, _, _ in named)


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
