"""JSON of another party, within stated bounds; and JSON that every party accepts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from .errors import WireError
from .text import UNWRITABLE, printable

MAX_JSON_BYTES = 64 * 2**20
"""Length of a message's JSON."""

MAX_DEPTH = 24
"""Lists and objects inside one another."""

MAX_VALUES = 1_000_000
"""Values of a message's JSON, those in lists and objects included."""

MAX_CONTAINERS = 100_000
"""Lists and objects of a message's JSON."""

MAX_KEY = 512
"""Characters of a key, and of a tensor's name."""

MAX_TEXT = 4 * 2**20
"""Characters of a text."""

MAX_INTEGER = 2**63
"""Integers are smaller than this, and larger than its negative."""

MAX_FLOAT = 1e30
"""Largest size of a float; sums of such numbers are still finite."""

_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)
_BRACKET = re.compile(r"[\[\]{}]")
_INTEGER_DIGITS = len(str(MAX_INTEGER)) + 1
_UNCLEAN = re.compile(r"\\(?:u00[01]|u00[7]f|ud[89a-f]|b|f)|[\x7f\ud800-\udfff]")  # at the least


def read_json(payload: Any, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object of another party.

    Depth and number of values, lengths of texts and keys, and the sizes of numbers are bounded; keys occur
    once; texts hold no lone surrogates, and of control characters line breaks and tabs alone.

    Raises:
        WireError: it is longer than ``limit`` bytes (or characters), no JSON, no object, or beyond a bound.
    """
    if not isinstance(payload, bytes | str):  # whatever its type says
        raise WireError("a message is malformed: no JSON")
    if len(payload) > limit:
        raise WireError(f"a message's JSON of {len(payload)} bytes; at most {limit} are allowed")
    try:
        text = payload if isinstance(payload, str) else payload.decode("utf-8")
    except UnicodeDecodeError:
        raise WireError("a message is malformed: its JSON is not UTF-8") from None
    _check_structure(text)
    try:
        values = json.loads(
            text, object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_constant
        )
    except (ValueError, RecursionError) as error:
        raise WireError(f"a message is malformed: {first_line(error)}") from None
    if not isinstance(values, dict):
        raise WireError("a message is malformed: its values must be a JSON object")
    _check_texts(values)
    return values


def write_json(values: Any) -> str:
    """Values as JSON in one line. What no party accepts in a text is a space in it (:func:`clean`)."""
    text = json.dumps(values)
    return json.dumps(clean(values)) if _UNCLEAN.search(text) else text


def clean(values: Any) -> Any:
    """Values as they may travel: what no party accepts in a text or a key (control characters but line breaks
    and tabs, lone surrogates) is a space.
    """
    if isinstance(values, str):
        return UNWRITABLE.sub(" ", values)
    if isinstance(values, Mapping):
        return {clean(key): clean(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [clean(value) for value in values]
    return values


# --- parts ---


def _check_structure(text: str) -> None:
    """Bound depth and number of values before anything is parsed."""
    if text.count("[") + text.count("{") <= MAX_DEPTH and text.count(",") <= MAX_VALUES:
        return
    bare = _STRING.sub("", text)
    if bare.count(",") > MAX_VALUES:
        raise WireError(f"a message has more than {MAX_VALUES:,} values")
    if bare.count("[") + bare.count("{") > MAX_CONTAINERS:
        raise WireError(f"a message has more than {MAX_CONTAINERS:,} lists and objects")
    depth = 0
    for match in _BRACKET.finditer(bare):
        depth += 1 if match.group() in "[{" else -1
        if depth > MAX_DEPTH:
            raise WireError(f"a message is malformed: deeper than {MAX_DEPTH} lists and objects")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise WireError("a message is malformed: a key occurs twice")
    return found


def _integer(digits: str) -> int:
    if len(digits) > _INTEGER_DIGITS or not -MAX_INTEGER < (number := int(digits)) < MAX_INTEGER:
        raise WireError(f"a message is malformed: an integer of {len(digits)} digits")
    return number


def _float(text: str) -> float:
    number = float(text)
    if not abs(number) <= MAX_FLOAT:
        raise WireError(f"a message is malformed: a number beyond {MAX_FLOAT}")
    return number


def _constant(name: str) -> NoReturn:
    raise WireError(f"a message is malformed: {name} is no number")


def _check_texts(values: Mapping[str, Any]) -> None:
    left: list[Any] = [values]
    while left:
        value = left.pop()
        if isinstance(value, str):
            _check_text(value, MAX_TEXT)
        elif isinstance(value, dict):
            for key in value:
                _check_text(key, MAX_KEY)
            left += value.values()
        elif isinstance(value, list):
            left += value


def _check_text(text: str, limit: int) -> None:
    if len(text) > limit:
        raise WireError(f"a message is malformed: a text or key of {len(text)} characters")
    if found := UNWRITABLE.search(text):
        shown = printable(found.group(), lines=False)
        raise WireError(f"a message is malformed: a text or key holds {shown}")


def first_line(error: BaseException) -> str:
    """The first line of an error, short and printable."""
    lines = str(error).splitlines()
    return printable(lines[0], lines=False, longest=200) if lines else type(error).__name__
