"""Skellam noise: integers, each the difference of two Poisson numbers of the same mean.

Sums of independent Skellam numbers are Skellam numbers whose variances add, so that the noise of several
clients in a sum is that of one mechanism with all of their variance (Agarwal et al. 2021, *The Skellam
mechanism for differentially private federated learning*, arXiv 2110.04995). It adds to integers, so that
nothing of a guarantee depends on how floating-point numbers are rounded.

**What is drawn.** Poisson numbers of a mean below :data:`SMALL` by inversion of the cumulative distribution,
others by transformed rejection (Hoermann 1993, *The transformed rejection method for generating Poisson
random variables*, algorithm PTRS). A mean here is about 1e9, where the usual formula for the logarithm of the
probability, k log(mean) - mean - log(k!), has lost five of its digits after the point to cancellation. It is
computed as a deviance instead (Loader 2000, *Fast and accurate computation of binomial probabilities*), to
1e-9 of the probability. No normal number is rounded. Numbers beyond :data:`REACH` standard deviations, of
probability e^-128, are not drawn: so the largest noise is known, and a sum cannot wrap.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import pdtr

from .noise import NoiseKey

SMALL = 1e4
"""Mean below which a table of the distribution is searched."""

REACH, MARGIN = 16.0, 64.0
"""Standard deviations, and numbers beyond these, from the mean of a Poisson number at most."""

STEP = 2**18
"""Numbers that are drawn at a time."""

Integers = NDArray[np.int64]


def skellam(key: NoiseKey, round_number: int, name: str, variance: float, count: int) -> Integers:
    """Independent Skellam numbers of mean 0, (count,), a function of the key, the round and the name.

    Raises:
        ValueError: the variance is not positive.
    """
    if not 0 < variance < math.inf:
        raise ValueError(f"variance {variance}: must be positive")
    result = np.empty(count, np.int64)
    for number, start in enumerate(range(0, count, STEP)):
        part = result[start : start + STEP]
        here = f"{name}/{number}"
        part[:] = _poisson(key, round_number, f"{here}/plus", variance / 2, len(part))
        part -= _poisson(key, round_number, f"{here}/minus", variance / 2, len(part))
    return result


def largest(variance: float) -> int:
    """The size that no Skellam number of this variance exceeds."""
    return 2 * math.ceil(_farthest(variance / 2))


def log_poisson(offsets: NDArray[np.float64], mean: float) -> NDArray[np.float64]:
    """The logarithm of the probability of each number floor(mean) + offset of a Poisson distribution, for
    means from :data:`SMALL` on and numbers above 1,000 (Loader 2000).
    """
    numbers = math.floor(mean) + offsets
    apart = (offsets - (mean - math.floor(mean))) / mean
    deviance = mean * ((1 + apart) * np.log1p(apart) - apart)
    stirling = 1 / (12 * numbers) - 1 / (360 * numbers**3)
    found: NDArray[np.float64] = -deviance - stirling - 0.5 * np.log(2 * math.pi * numbers)
    return found


def _poisson(key: NoiseKey, round_number: int, name: str, mean: float, count: int) -> Integers:
    """Poisson numbers less floor(mean), (count,)."""
    if mean < SMALL:
        table = pdtr(np.arange(math.ceil(mean + _farthest(mean))), mean)
        found = np.searchsorted(table, key.uniform(round_number, name, count))
        return np.asarray(np.minimum(found, len(table) - 1) - math.floor(mean), np.int64)
    result, left, attempt = np.empty(count, np.int64), np.arange(count), 0
    while len(left):
        first, second = key.uniform(round_number, f"{name}/{attempt}", 2 * len(left)).reshape(2, -1)
        offsets, taken = _attempt(first - 0.5, second, mean)
        result[left[taken]] = offsets[taken]
        left, attempt = left[~taken], attempt + 1
    return result


def _attempt(
    first: NDArray[np.float64], second: NDArray[np.float64], mean: float
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """One attempt of PTRS at each number, from numbers in (-1/2, 1/2) and in (0, 1): offsets from
    floor(mean), and which of them are drawn.
    """
    b = 0.931 + 2.53 * math.sqrt(mean)
    a = -0.059 + 0.02483 * b
    inside = 0.5 - np.abs(first)
    offsets = np.floor((2 * a / inside + b) * first + (mean - math.floor(mean)) + 0.43)
    taken = (inside >= 0.07) & (second <= 0.9277 - 3.6224 / (b - 2))
    rest = ~taken & ((inside >= 0.013) | (second <= inside)) & (np.abs(offsets) < _farthest(mean) - 1)
    hat = a / inside[rest] ** 2 + b
    height = np.log(second[rest] * (1.1239 + 1.1328 / (b - 3.4)) / hat)
    taken[rest] = height <= log_poisson(offsets[rest], mean)
    return offsets, taken


def _farthest(mean: float) -> float:
    return REACH * math.sqrt(mean) + MARGIN
