"""Renyi accounting: releases of Skellam noise, and of Gaussian noise beside it, as (epsilon, delta).

The bounds on Skellam noise hold for whole orders. Between two of them (order - 1) times the divergence is
convex in the order, so that the straight line between is a bound too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

HIGHEST = 4096
"""The highest order that is looked at."""

FINE = 64
"""Orders below which fractions are looked at too."""

FRACTIONS = 32


def skellam_renyi(orders: Floats, l2: float, l1: float, variance: float) -> Floats:
    """A bound on the Renyi divergence of whole orders, of Skellam noise of this ``variance`` in each number
    of a vector of integers that one unit moves by ``l2`` and ``l1`` at most in these norms::

        order l2^2 / (2 v) + min(((2 order - 1) l2^2 + 6 l1) / (4 v^2), 3 l1 / (2 v))

    Agarwal et al. 2021 (arXiv 2110.04995), theorem on multi-dimensional Skellam noise, v its variance.
    """
    more = ((2 * orders - 1) * l2**2 + 6 * l1) / (4 * variance**2)
    return orders * l2**2 / (2 * variance) + np.minimum(more, 3 * l1 / (2 * variance))


def epsilon_of(divergence: Callable[[Floats], Floats], delta: float) -> float:
    """Epsilon at this ``delta``, from a bound on the Renyi divergence of whole orders (Canonne, Kamath and
    Steinke 2020, *The discrete Gaussian for differential privacy*, proposition 12).
    """
    whole = np.arange(1, HIGHEST + 1, dtype=np.float64)
    scaled = (whole - 1) * divergence(whole)
    orders, lower, share = _orders()
    found = ((1 - share) * scaled[lower] + share * scaled[np.minimum(lower + 1, HIGHEST - 1)]) / (orders - 1)
    epsilons = found + np.log1p(-1 / orders) - (np.log(delta) + np.log(orders)) / (orders - 1)
    return max(0.0, float(epsilons.min()))


@lru_cache
def _orders() -> tuple[Floats, NDArray[np.int64], Floats]:
    """Orders above 1, the places of the whole orders below them, and how far they are from these."""
    fine = 1 + np.arange(1, FRACTIONS * (FINE - 1), dtype=np.float64) / FRACTIONS
    orders = np.concatenate([fine, np.arange(FINE, HIGHEST + 1, dtype=np.float64)])
    lower = np.floor(orders)
    return orders, lower.astype(np.int64) - 1, orders - lower
