"""Names, shapes and dtypes of compressed tensors, as far as the receiver does not know them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.errors import WireError
from ..core.tensors import DTYPE_NAMES, Tensors

Layout = list[int] | dict[str, list[Any]] | None
"""What :func:`describe` tells."""

MOST_NUMBERS, MOST_TIMES = 2**24, 16
"""How many numbers a described layout may have beyond :data:`MOST_TIMES` as many as the receiver knows: of a
compressed change, a message of a few bytes could stand for as many as it likes.
"""

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def describe(tensors: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> Layout:
    """How the receiver, who has ``known``, is told the names, shapes and dtypes of what was compressed: not
    at all where they are the same, by the places of the names where they are among them, else one by one.
    """
    same = all(n in known and _form(t) == _form(known[n]) for n, t in tensors.items())
    if same and len(tensors) == len(known):
        return None
    if same:
        return [place for place, name in enumerate(sorted(known)) if name in tensors]
    return {name: [*_form(tensor)] for name, tensor in sorted(tensors.items())}


def laid_out(layout: object, known: Mapping[str, Tensor]) -> Tensors:
    """Tensors with the names, shapes and dtypes that :func:`describe` told of; they take no memory.

    Raises:
        WireError: it is not such a description, or one of far more numbers than ``known`` has.
    """
    if layout is None:
        return dict(known)
    names = sorted(known)
    if isinstance(layout, list):
        if not all(type(place) is int and 0 <= place < len(names) for place in layout):
            raise WireError("a compressed change names tensors that were not sent")
        return {names[place]: known[names[place]] for place in layout}
    if not isinstance(layout, dict):
        raise WireError("a compressed change does not say what it holds")
    result: Tensors = {}
    left = MOST_NUMBERS + MOST_TIMES * sum(tensor.numel() for tensor in known.values())
    for name, form in layout.items():
        dtype = DTYPES.get(str(form[0])) if isinstance(form, list) and len(form) == 2 else None
        shape = form[1] if dtype is not None else None
        if dtype is None or not isinstance(shape, list) or len(shape) > 8:
            raise WireError(f"{name}: neither dtype nor shape")
        if not all(type(size) is int and 0 <= size < 2**31 for size in shape):
            raise WireError(f"{name}: no shape: {shape}")
        left -= math.prod(shape)
        if left < 0:
            raise WireError(f"{name}: a compressed change of far more numbers than were sent")
        result[name] = torch.empty(1, dtype=dtype).expand(shape)
    return result


def _form(tensor: Tensor) -> tuple[str, list[int]]:
    return DTYPE_NAMES[tensor.dtype], list(tensor.shape)
