"""Vectors of integers modulo 2^32 or 2^64."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.uint32] | NDArray[np.uint64]
"""A vector of integers modulo 2^32 or 2^64, (numbers,)."""

Bits = Literal[32, 64]
"""Of an integer that travels."""


def zeros(count: int, bits: Bits) -> Numbers:
    """A vector of so many zeros."""
    return np.zeros(count, np.uint32) if bits == 32 else np.zeros(count, np.uint64)


def bits_of(numbers: Numbers) -> Bits:
    """The size of a vector's integers."""
    return 32 if numbers.itemsize == 4 else 64
