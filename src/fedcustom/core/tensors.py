"""Operations on states: dictionaries of named tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
"""The dtypes that may travel, with safetensors' names, in the order in which it puts them last to first."""


def combine(
    function: Callable[..., Tensor], first: Mapping[str, Tensor], *rest: Mapping[str, Tensor]
) -> Tensors:
    """Apply ``function`` name by name to states that have the same names.

    Raises:
        KeyError: a state lacks a name of the first, or has one more.
    """
    for other in rest:
        if other.keys() != first.keys():
            raise KeyError(f"states differ in names: {sorted(other.keys() ^ first.keys())}")
    return {name: function(tensor, *(other[name] for other in rest)) for name, tensor in first.items()}


def add(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> Tensors:
    """``left + right``, name by name."""
    return combine(torch.add, left, right)


def subtract(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> Tensors:
    """``left - right``, name by name."""
    return combine(torch.sub, left, right)


def scale(tensors: Mapping[str, Tensor], factor: float) -> Tensors:
    """Every tensor times ``factor``."""
    return combine(lambda tensor: tensor * factor, tensors)


def zeros_like(tensors: Mapping[str, Tensor]) -> Tensors:
    """Zeros of the same names, shapes and dtypes."""
    return combine(torch.zeros_like, tensors)


def copy(tensors: Mapping[str, Tensor]) -> Tensors:
    """A detached, contiguous copy that shares no memory with ``tensors``."""
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }


def dot(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """The inner product over all names, summed in float64."""
    return sum(float((tensor.double() * right[name].double()).sum()) for name, tensor in left.items())


def norm(tensors: Mapping[str, Tensor]) -> float:
    """The Euclidean norm over all names."""
    return math.sqrt(dot(tensors, tensors))


def count(tensors: Iterable[Tensor]) -> int:
    """How many numbers the tensors hold."""
    return sum(tensor.numel() for tensor in tensors)


def is_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether no tensor holds a NaN or an infinity."""
    return all(_is_finite(tensor) for tensor in tensors.values())


def _is_finite(tensor: Tensor) -> bool:
    """Extremes say it without the copies that ``isfinite`` makes: a NaN is both of them."""
    if tensor.numel() == 0 or not tensor.dtype.is_floating_point:
        return True
    least, most = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(least) & torch.isfinite(most))


def equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether both have the same names and bitwise equal values (NaN equals nothing)."""
    return left.keys() == right.keys() and all(
        torch.equal(tensor, right[name]) for name, tensor in left.items()
    )


def part(tensors: Mapping[str, Tensor], prefix: str) -> Tensors:
    """The tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def named(tensors: Mapping[str, Tensor], prefix: str) -> Tensors:
    """The tensors with ``prefix`` before their names."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def without(tensors: Mapping[str, Tensor], *prefixes: str) -> Tensors:
    """The tensors whose names begin with none of ``prefixes``."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}
