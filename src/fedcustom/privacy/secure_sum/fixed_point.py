"""Fixed point: numbers as integers modulo 2^32 or 2^64, so that sums are exact and masks can hide them.

A number x of at most ``bound`` in size becomes round(x * scale), scale = 2^(30 - ceil(log2 n)) / bound for
the sum of n sites (62 in place of 30 for 64 bits). The sum is at most 2^30 in size and is read as a signed
integer. Rounding is stochastic: up with the probability of what would be cut off, so that its error is 0 on
average. Its randomness follows from a key that simulation and deployment have in common, so that both give
the same integers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import UpdateError
from .integers import Bits, Numbers, zeros

STEP = 2**18
"""Numbers that are rounded at a time."""


@dataclass(frozen=True)
class FixedPoint:
    """Integers for numbers of at most ``bound`` in size that at most ``sites`` sites add up.

    Raises:
        ValueError: the bound is not positive, or there are no sites.
    """

    bound: float
    sites: int
    bits: Bits = 32

    def __post_init__(self) -> None:
        if not (self.bound > 0 and math.isfinite(self.bound)):
            raise ValueError(f"bound {self.bound}: must be positive")
        if self.sites < 1:
            raise ValueError(f"sites {self.sites}: must be positive")

    @property
    def scale(self) -> float:
        """By what numbers are multiplied."""
        return float(2.0 ** (self.bits - 2 - (self.sites - 1).bit_length()) / self.bound)

    def encode(self, values: NDArray[Any], key: bytes) -> Numbers:
        """Integers for some values, (numbers,); ``key`` decides how they are rounded.

        Raises:
            UpdateError: a value is beyond the bound, or not finite.
        """
        result = zeros(len(values), self.bits)
        signed = _signed(result)
        drawn = draws(key, len(values))
        for start in range(0, len(values), STEP):
            some = values[start : start + STEP].astype(np.float64)
            size = float(np.abs(some).max(initial=0.0))
            if not size <= self.bound:  # NaN is not
                raise UpdateError(f"a number of size {size:.6g}: at most {self.bound:g} is allowed")
            some *= self.scale
            whole = np.floor(some)
            # Beyond 2^52 a float has no fraction left, and this adds 0.
            whole += next(drawn) < some - whole
            signed[start : start + STEP] = whole
        return result

    def decode(self, numbers: Numbers) -> NDArray[np.float64]:
        """The values that integers stand for, which may be a sum."""
        values: NDArray[np.float64] = _signed(numbers).astype(np.float64)
        values /= self.scale
        return values


def rounding_key(*parts: str | int) -> bytes:
    """The key of one site's rounding: of seed, round, site and purpose."""
    return hashlib.sha256(json.dumps(["rounding", *parts]).encode()).digest()


def counts(values: Sequence[int], sites: int, bits: Bits = 32) -> Numbers:
    """Integers for whole numbers that at most ``sites`` sites add up; they stay as they are.

    Raises:
        UpdateError: one is negative, or so large that the sum may not fit.
    """
    most = (2 ** (bits - 1) - 1) // sites
    for value in values:
        if not 0 <= value <= most:
            raise UpdateError(f"a count of {value}: must be from 0 to {most} for {sites} sites")
    found = zeros(len(values), bits)
    found[:] = values
    return found


def _signed(numbers: Numbers) -> NDArray[Any]:
    """The same memory as signed integers."""
    return numbers.view(np.int32 if numbers.itemsize == 4 else np.int64)


def draws(key: bytes, count: int) -> Iterator[NDArray[np.float64]]:
    """Random numbers from 0 to below 1 for :data:`STEP` values after another, the same on every machine."""
    for number, start in enumerate(range(0, count, STEP)):
        size = min(STEP, count - start)
        stream = hashlib.shake_128(key + number.to_bytes(8, "little")).digest(4 * size)
        yield np.frombuffer(stream, "<u4").astype(np.float64) / 2.0**32
