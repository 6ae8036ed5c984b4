"""Skellam numbers against the exact distribution: probabilities, moments, tails, and what the key decides."""

from __future__ import annotations

import itertools
import math

import mpmath
import numpy as np
import pytest
from scipy import stats

from fedcustom.privacy import skellam as module
from fedcustom.privacy.noise import NoiseKey
from fedcustom.privacy.skellam import largest, log_poisson, skellam

KEY = NoiseKey.seeded(7)


@pytest.mark.parametrize("mean", [1e4, 12345.678, 2.2e9 + 0.25, 1e11])
def test_the_logarithm_of_the_probability_is_exact_to_a_billionth(mean: float) -> None:
    """Fifty digits; the usual formula in double precision is off by 1e-5 at such means."""
    mpmath.mp.dps = 50
    offsets = np.floor(np.array([-16, -5, -1, -0.01, 0, 0.5, 3, 16]) * math.sqrt(mean))
    found = log_poisson(offsets, mean)
    for offset, value in zip(offsets, found, strict=True):
        number = math.floor(mean) + int(offset)
        exact = number * mpmath.log(mean) - mpmath.mpf(mean) - mpmath.loggamma(number + 1)
        assert abs(float(exact - mpmath.mpf(value))) < 1e-9


@pytest.mark.parametrize("variance", [0.5, 14.0, 1.9e4, 2.1e4, 4e9])
def test_moments(variance: float) -> None:
    count = 200_000
    found = skellam(KEY, 3, "x", variance, count).astype(float)
    assert abs(found.mean()) < 5 * math.sqrt(variance / count)
    fourth = 3 + 1 / variance  # of a Skellam number in units of the squared variance
    assert abs(found.var() / variance - 1) < 5 * math.sqrt((fourth - 1) / count)
    assert abs(stats.kurtosis(found) - 1 / variance) < 5 * math.sqrt(24 / count) * max(1, 6 / variance)
    assert abs(stats.skew(found)) < 5 * math.sqrt(15 * max(1, 1 / variance) / count)
    assert np.abs(found).max() <= largest(variance)


@pytest.mark.parametrize("variance", [3.0, 1.5e4, 4e4])
def test_frequencies(variance: float) -> None:
    """Chi-squared over twenty intervals of about equal probability, below and above the change of method."""
    count = 100_000
    found = skellam(KEY, 1, "y", variance, count)
    cuts = np.unique(stats.skellam.ppf(np.linspace(0.05, 0.95, 19), variance / 2, variance / 2))
    edges = np.array([-np.inf, *cuts, np.inf])
    expected = np.diff(np.array([0, *stats.skellam.cdf(cuts, variance / 2, variance / 2), 1])) * count
    counts = np.array([((found > low) & (found <= high)).sum() for low, high in itertools.pairwise(edges)])
    assert stats.chisquare(counts, expected).pvalue > 1e-4


def test_frequencies_at_the_means_of_a_run() -> None:
    """Poisson numbers of mean 2e9 in intervals of the exact distribution."""
    count, mean = 200_000, 2e9 + 0.3
    found = module._poisson(KEY, 1, "z", mean, count)
    cuts = stats.poisson.ppf(np.linspace(0.02, 0.98, 49), mean) - math.floor(mean)
    expected = np.diff(np.array([0, *stats.poisson.cdf(cuts + math.floor(mean), mean), 1])) * count
    counts = np.bincount(np.searchsorted(cuts, found, side="left"), minlength=50)
    assert stats.chisquare(counts, expected).pvalue > 1e-4


def test_the_sum_of_clients_noise_is_noise_of_all_their_variance() -> None:
    """Closed under sums: six clients with a sixth each."""
    total = sum(skellam(NoiseKey.seeded(n), 1, "x", 5.0, 50_000) for n in range(6))
    cuts = np.arange(-12, 13)
    observed = np.bincount(np.searchsorted(cuts, total), minlength=26)
    exact = np.diff(np.array([0, *stats.skellam.cdf(cuts, 15, 15), 1])) * 50_000
    assert stats.chisquare(observed, exact).pvalue > 1e-4


def test_the_key_the_round_and_the_name_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    first = skellam(KEY, 1, "x", 1e9, 100)
    assert (skellam(KEY, 1, "x", 1e9, 100) == first).all()
    others = [
        skellam(KEY.of("a"), 1, "x", 1e9, 100),
        skellam(KEY.of("b"), 1, "x", 1e9, 100),
        skellam(KEY, 2, "x", 1e9, 100),
        skellam(KEY, 1, "y", 1e9, 100),
    ]
    for number, one in enumerate([first, *others]):
        for other in [first, *others][:number]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.5
    assert KEY.of("a") != KEY.of("b")
    assert not KEY.of("a").secret
    monkeypatch.setattr(module, "STEP", 64)
    parts = skellam(KEY, 1, "x", 1e9, 100)
    assert len(np.unique(parts)) > 95, "parts do not repeat each other"
    assert skellam(KEY, 1, "x", 1e9, 0).shape == (0,)
    with pytest.raises(ValueError, match="variance"):
        skellam(KEY, 1, "x", 0.0, 1)
