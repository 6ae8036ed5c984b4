"""What travels between server and client: named tensors, numbers and texts, as bytes.

A message is eight bytes (the length of the JSON, little-endian), the JSON, and the tensors in safetensors
form. Nothing in it can run code when it is read, and it passes the gate (:mod:`.gate`) first.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import safetensors.torch
from torch import Tensor

from ..core import bounded_json
from ..core.errors import WireError
from ..core.tensors import DTYPE_NAMES, Tensors
from . import gate

DTYPES = DTYPE_NAMES

MAX_BYTES = 64 * 2**30

_UNCLEAN = re.compile(r"\\(?:u00[01]|b|f)|[\x7f\ud800-\udfff]")  # in JSON, at the least


def encode(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> bytes:
    """One message, whose texts are clean (:func:`fedcustom.core.bounded_json.clean`).

    Raises:
        WireError: a tensor's dtype may not travel, or a value is not a number, text, list or dict of them.
    """
    text = _json(values)
    _check_dtypes(tensors)
    body = safetensors.torch.save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    return struct.pack("<Q", len(text)) + text + body


def decode(payload: bytes, limit: int = MAX_BYTES) -> tuple[Tensors, dict[str, Any]]:
    """The tensors and values of a message.

    Raises:
        WireError: the message is larger than ``limit`` bytes, truncated, malformed, or beyond a bound of the
            gate.
    """
    if len(payload) > limit:
        raise WireError(f"a message of {len(payload)} bytes; at most {limit} are allowed")
    if len(payload) < 8:
        raise WireError("a message is truncated")
    (size,) = struct.unpack_from("<Q", payload)
    if size > bounded_json.MAX_JSON_BYTES or 8 + size > len(payload):
        raise WireError("a message is truncated or malformed")
    values = bounded_json.read_json(payload[8 : 8 + size])
    return gate.read_tensors(payload[8 + size :], limit), values


def length(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> int:
    """The length in bytes of :func:`encode`'s result, without copying the tensors.

    Raises:
        WireError: see :func:`encode`.
    """
    _check_dtypes(tensors)
    signature = tuple(
        (name, DTYPES[t.dtype], tuple(t.shape), t.element_size()) for name, t in tensors.items()
    )
    return 8 + len(_json(values)) + _safetensors_length(signature)


@lru_cache(maxsize=64)
def _safetensors_length(signature: tuple[tuple[str, str, tuple[int, ...], int], ...]) -> int:
    """Header and data of a safetensors file whose tensors have these names, dtypes, shapes and element
    sizes.
    """
    offset = 0
    header: dict[str, Any] = {}
    # The order matters because offsets stand in the header as text.
    rank = {dtype: number for number, dtype in enumerate(DTYPES.values())}
    for name, dtype, shape, size in sorted(signature, key=lambda entry: (-rank[entry[1]], entry[0])):
        count = size
        for dimension in shape:
            count *= dimension
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + count]}
        offset += count
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + (len(text) + 7) // 8 * 8 + offset


def _json(values: Mapping[str, Any]) -> bytes:
    def dumped(values: Any) -> str:
        return json.dumps(values, separators=(",", ":"), sort_keys=True, ensure_ascii=False)

    try:
        text = dumped(dict(values))
        if _UNCLEAN.search(text):
            text = dumped(bounded_json.clean(values))
        return text.encode()
    except (TypeError, ValueError) as error:
        raise WireError(f"only numbers, texts, lists and dicts can travel: {error}") from None


def _check_dtypes(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise WireError(f"{name}: {tensor.dtype} cannot travel; allowed: {', '.join(DTYPES.values())}")
