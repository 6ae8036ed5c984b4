"""Statistics of attacks: areas under ROC curves, intervals, and lower bounds on epsilon."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.stats import binom, norm, rankdata

Interval = tuple[float, float]

RESAMPLES = 1000
"""Bootstrap samples of an interval."""

CONFIDENCE = 0.95


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """The probability that a member's score is above another's, ties counted as half."""
    ranks = rankdata(np.concatenate([members, others]))
    count = len(members)
    above = ranks[:count].sum() - count * (count + 1) / 2
    return float(above / (count * len(others)))


def true_positives(members: np.ndarray, others: np.ndarray, false_positives: float) -> float:
    """The share of members above a threshold that at most this share of the others is above."""
    allowed = math.floor(false_positives * len(others))
    threshold = np.sort(others)[::-1][allowed]
    return float((members > threshold).mean())


def bootstrap(
    measure: Callable[[np.ndarray, np.ndarray], float], members: np.ndarray, others: np.ndarray, seed: int
) -> Interval:
    """The 95 % percentile interval of a measure, over resampled members and others."""
    generator = np.random.default_rng([seed, 31])
    found = [
        measure(generator.choice(members, len(members)), generator.choice(others, len(others)))
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def share_interval(values: np.ndarray, seed: int) -> Interval:
    """The 95 % percentile interval of a mean over resampled values, one a client or a sum."""
    generator = np.random.default_rng([seed, 32])
    found = generator.choice(values, (RESAMPLES, len(values))).mean(axis=1)
    low, high = np.quantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def wilson(hits: int, trials: int) -> Interval:
    """The 95 % score interval of a proportion (Wilson 1927)."""
    z, share = 1.959964, hits / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2))
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))


def epsilon_bound(
    correct: int, guesses: int, candidates: int, delta: float, *, swapped: bool = False
) -> float:
    """A lower bound on epsilon at 95 % confidence from one run in which each of the candidates was a member
    or not by a fair coin, and of which so many guesses were correct.

    Steinke, Nasr and Jagielski 2023, *Privacy Auditing with One (1) Training Run* (arXiv 2305.08846), the
    theorem for approximate differential privacy: with W correct guesses of r among m candidates, for all v::

        P(W >= v) <= b(v) + 2 m delta max_i (b(v - i) - b(v)) / i,   b(v) = P(Bin(r, e^eps/(1+e^eps)) >= v)

    0 where nothing can be said.

    ``swapped``: the coin decides which of two texts was there. One replaces the other, which is two steps of
    neighbours that differ in one unit: (2 epsilon, (1 + e^epsilon) delta).
    """

    def possible(epsilon: float) -> bool:
        most_delta = min(1.0, (1 + math.exp(epsilon)) * delta) if swapped else delta
        p = 1 / (1 + math.exp(-(2 * epsilon if swapped else epsilon)))
        tail = float(binom.sf(correct - 1, guesses, p))
        steps = np.arange(1, correct + 1)
        slack = (binom.sf(correct - 1 - steps, guesses, p) - tail) / steps
        most = float(slack.max()) if len(slack) else 0.0
        return tail + 2 * candidates * most_delta * most > 1 - CONFIDENCE

    if possible(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while not possible(high) and high < 64:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if possible(middle) else (middle, high)
    return low


def gaussian_separation(
    members: np.ndarray, others: np.ndarray, confidence: float, shares: np.ndarray | None = None
) -> tuple[float, float]:
    """How many standard deviations apart two normal samples of one variance are, and a lower bound on it.

    With n of each, the difference d of means over the others' standard deviation is about normal, with
    variance 2/n + d^2 / (2 (n - 1)) (Hedges and Olkin 1985, of Glass's estimate). Where the members are apart
    by ``shares`` r of the distance that is asked for, (members,), means are sum r x / sum r^2, the estimate
    by least squares, and sum r^2 takes the place of n.
    """
    r = np.ones(len(members)) if shares is None else shares
    number = float(r @ r)
    apart = float(r @ (members - others)) / number / float(others.std(ddof=1))
    spread = math.sqrt(2 / number + apart**2 / (2 * (len(others) - 1)))
    return apart, max(0.0, apart - float(norm.ppf(confidence)) * spread)
