"""The gate that everything foreign passes first: JSON and tensors of another party, within stated bounds.

What is beyond a bound is refused before memory is spent on it, with :class:`~fedcustom.core.errors.WireError`
and nothing else, whatever the bytes are. What a message *means* is checked after this
(:mod:`fedcustom.transport.messages`).
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import safetensors.torch
import torch

from ..core.errors import WireError
from ..core.tensors import DTYPE_NAMES, Tensors
from ..core.text import UNWRITABLE, printable

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

MAX_HEADER_BYTES = 16 * 2**20
"""Length of the header of tensors."""

MAX_TENSORS = 100_000
MAX_DIMENSIONS = 8

ITEM_SIZES = {name: torch.empty(0, dtype=dtype).element_size() for dtype, name in DTYPE_NAMES.items()}
"""Bytes of a number, by the dtypes that may travel."""

_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)
_BRACKET = re.compile(r"[\[\]{}]")
_INTEGER_DIGITS = len(str(MAX_INTEGER)) + 1


def read_json(payload: bytes | str, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object of another party.

    Depth and number of values, lengths of texts and keys, and the sizes of numbers are bounded; keys occur
    once; texts hold no lone surrogates, and of control characters line breaks and tabs alone.

    Raises:
        WireError: it is longer than ``limit`` bytes (or characters), no JSON, no object, or beyond a bound.
    """
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
        raise WireError(f"a message is malformed: {_first_line(error)}") from None
    if not isinstance(values, dict):
        raise WireError("a message is malformed: its values must be a JSON object")
    _check_texts(values)
    return values


def check_tensors(header: bytes, size: int, limit: int) -> None:
    """Refuse tensors by their safetensors header alone, before they are read.

    Args:
        header: The header's JSON.
        size: Bytes of the numbers that follow it.
        limit: Most bytes of numbers that are allowed.

    Raises:
        WireError: there are more, the header is malformed, a dtype may not travel, or names, shapes and
            places do not fit the bytes.
    """
    if size > limit:
        raise WireError(f"tensors of {size} bytes; at most {limit} are allowed")
    entries = read_json(header, MAX_HEADER_BYTES)
    if len(entries) > MAX_TENSORS:
        raise WireError(f"{len(entries)} tensors; at most {MAX_TENSORS} are allowed")
    places = sorted(_place(name, entry) for name, entry in entries.items())
    end = 0
    for start, stop in places:
        if start != end:
            raise WireError("a message is malformed: its tensors overlap or leave gaps")
        end = stop
    if end != size:
        raise WireError("a message is malformed: its tensors do not fill their bytes")


def read_tensors(payload: bytes, limit: int) -> Tensors:
    """The tensors of another party, in safetensors form.

    Raises:
        WireError: see :func:`check_tensors`; or the bytes are truncated.
    """
    header = _header(payload[:8], len(payload))
    check_tensors(payload[8 : 8 + header], len(payload) - 8 - header, limit)
    try:
        return dict(safetensors.torch.load(payload))
    except Exception as error:  # whatever the reader makes of foreign bytes
        raise WireError(f"a message is malformed: {_first_line(error)}") from None


def read_tensor_file(path: Path, limit: int) -> Tensors:
    """The tensors of another party that lie in a safetensors file. They are mapped, not read.

    Raises:
        WireError: see :func:`read_tensors`; or the file is not there.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = _header(file.read(8), size)
            check_tensors(_read_all(file, header), size - 8 - header, limit)
        return dict(safetensors.torch.load_file(path))
    except WireError:
        raise
    except FileNotFoundError:
        raise WireError("a message's tensors did not get through") from None
    except Exception as error:  # whatever the reader makes of a foreign file
        raise WireError(f"a message is malformed: {_first_line(error)}") from None


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


def _header(prefix: bytes, size: int) -> int:
    """The length of a safetensors header, from its first eight bytes."""
    if len(prefix) < 8:
        raise WireError("a message is truncated")
    (length,) = struct.unpack("<Q", prefix)
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise WireError("a message is truncated or malformed")
    return int(length)


def _place(name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor's bytes begin and end, by its entry in the header."""
    shown = printable(name[:60], lines=False)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise WireError(f"a message is malformed: {shown}: no tensor")
    dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        allowed = ", ".join(ITEM_SIZES)
        raise WireError(
            f"{shown}: {printable(str(dtype)[:20], lines=False)} cannot travel; allowed: {allowed}"
        )
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise WireError(f"a message is malformed: {shown}: no shape")
    if not _are_sizes(place) or len(place) != 2:
        raise WireError(f"a message is malformed: {shown}: no place")
    # A size beside a 0 must be sound too: readers multiply in their own integers.
    if math.prod(size or 1 for size in shape) >= MAX_INTEGER // 16:
        raise WireError(f"a message is malformed: {shown}: no shape")
    if place[1] - place[0] != math.prod(shape) * ITEM_SIZES[dtype]:
        raise WireError(f"a message is malformed: {shown}: its shape does not fit its bytes")
    return place[0], place[1]


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _read_all(file: BinaryIO, size: int) -> bytes:
    content = file.read(size)
    if len(content) != size:
        raise WireError("a message is truncated")
    return content


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return printable(lines[0], lines=False)[:200] if lines else type(error).__name__
