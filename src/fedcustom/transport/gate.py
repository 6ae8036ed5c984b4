"""The gate for tensors of another party, within stated bounds; :mod:`fedcustom.core.bounded_json` is that for
JSON. Everything foreign passes one of them first.

What is beyond a bound is refused before memory is spent on it, with :class:`~fedcustom.core.errors.WireError`
and nothing else, whatever the bytes are. What a message *means* is checked after this
(:mod:`fedcustom.transport.messages`).
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch

from ..core.bounded_json import MAX_INTEGER, first_line, read_json
from ..core.errors import WireError
from ..core.tensors import DTYPE_NAMES, Tensors
from ..core.text import printable

MAX_HEADER_BYTES = 16 * 2**20
"""Length of the header of tensors."""

MAX_TENSORS = 100_000
MAX_DIMENSIONS = 8

ITEM_SIZES = {name: torch.empty(0, dtype=dtype).element_size() for dtype, name in DTYPE_NAMES.items()}
"""Bytes of a number, by the dtypes that may travel."""


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
        raise WireError(f"a message is malformed: {first_line(error)}") from None


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
        raise WireError(f"a message is malformed: {first_line(error)}") from None


# --- parts ---


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
