"""Noise that clients add to their own changes before these are summed under masks (``noise = "sum"``).

A client's change is bounded, multiplied and rounded to integers, so that each of its groups has the norm
:data:`SCALE` at most: exactly, for this is checked in integers. It adds Skellam noise to each number. The
server learns the sum alone, in which the honest clients' noise is as much as the guarantee needs, even if
those that collude tell the server theirs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..core.errors import SecureSumError
from .secure_sum.fixed_point import draws
from .secure_sum.terms import LEAST_SITES, Terms
from .skellam import Integers, largest

SCALE = 2**16
"""Norm of a group of a client's integers at most."""

ROOM = 2**31 - 1
"""The largest size of a sum that 32 bits hold."""

ATTEMPTS = 64
"""How often a group is rounded at random; then to the nearest integers."""

SAFE = 1e-9
"""By how much, relative to it, a group is made shorter before it is rounded to the nearest."""


@dataclass(frozen=True)
class SumNoise:
    """Noise of a round's clients together: in each number the variance of ``groups`` times
    (``noise_multiplier`` SCALE)^2, from those that are left and honest by the ``terms`` of the secure sum.
    """

    noise_multiplier: float
    terms: Terms
    groups: int = 2

    def variance(self, needed: int) -> float:
        """Of one client's noise in one number, where ``needed`` clients have to stay (t): those of them that
        do not collude have all of it.
        """
        return self.total / (needed - self.terms.colluding)

    @property
    def total(self) -> float:
        """The least variance of the noise in one number of a sum, without that of clients that collude."""
        return self.groups * (self.noise_multiplier * SCALE) ** 2

    def most(self, clients: int) -> int:
        """The size that no number exceeds in the sum of so many clients.

        Raises:
            SecureSumError: see :meth:`~.secure_sum.terms.Terms.needed`.
        """
        return clients * (SCALE + largest(self.variance(self.terms.needed(clients))))

    def fits(self, clients: int) -> bool:
        """Whether 32 bits hold a sum of so many clients, and of any fewer that a sum can be of."""
        return all(
            self.most(count) <= ROOM for count in _possible(self.terms, range(LEAST_SITES, clients + 1))
        )


def _possible(terms: Terms, counts: Iterable[int]) -> Iterable[int]:
    for count in counts:
        try:
            terms.needed(count)
        except SecureSumError:
            continue
        yield count


def factor_of(numbers: int) -> float:
    """What a group of so many numbers, of norm 1 at most, is multiplied by before it is rounded.

    Rounding lengthens a vector by sqrt(numbers) / 2 at most where each number goes to the nearest integer
    (arXiv 2110.04995 adds that to the sensitivity; here the vector is shorter by it, so that the sensitivity
    is the same for all methods).

    Raises:
        ValueError: there are too many.
    """
    if not (factor := SCALE - math.sqrt(numbers) / 2) > 0:
        raise ValueError(f"{numbers} numbers: too many to be rounded")
    return factor


def rounded(values: NDArray[np.float64], key: bytes) -> Integers:
    """Integers for a group of norm 1 at most, (numbers,), whose norm is :data:`SCALE` at most. Each number is
    rounded up with the probability of what would be cut off; ``key`` decides, and need not be secret. What is
    too long is rounded anew.

    Raises:
        ValueError: the norm is above 1, or not finite.
    """
    scaled = values * factor_of(len(values))
    if not np.linalg.norm(values) <= 1 + SAFE:  # NaN is not
        raise ValueError("a group of norm above 1 is to be rounded")
    low = np.floor(scaled)
    for attempt in range(ATTEMPTS):
        stream = draws(hashlib.sha256(key + attempt.to_bytes(4, "little")).digest(), len(values))
        drawn = np.concatenate(list(stream)) if len(values) else scaled
        found = (low + (drawn < scaled - low)).astype(np.int64)
        if is_within(found):
            return found
    return np.rint(scaled * (1 - 2 * SAFE)).astype(np.int64)


def is_within(numbers: Integers) -> bool:
    """Whether the norm of a group's integers is :data:`SCALE` at most, in exact arithmetic: squares of up to
    2^34 in size, of which 2^28 may be added up.
    """
    sized = bool(np.abs(numbers).max(initial=0) <= 2 * SCALE)
    return sized and int(np.dot(numbers, numbers)) <= SCALE**2
