"""Accounting: against two other accountants, and against samples of the privacy loss."""

from __future__ import annotations

import math

import dp_accounting as dp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from fedcustom.privacy.accounting import (
    Event,
    Ledger,
    calibrate,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_mu,
)


def test_mu_of_epsilon_8() -> None:
    assert gaussian_mu(8, 1e-5) == pytest.approx(1.666, abs=5e-4)


@pytest.mark.parametrize(("mu", "epsilon"), [(0.5, 1.0), (1.666, 8.0), (3.0, 0.0), (0.1, 3.0)])
def test_the_gaussian_curve_is_the_largest_difference_of_probabilities(mu: float, epsilon: float) -> None:
    """N(mu, 1) against N(0, 1), by quadrature of what exceeds e^epsilon times the other."""
    x = np.linspace(-12, 12 + mu, 2_000_001)
    excess = np.maximum(0, norm.pdf(x, mu) - np.exp(epsilon) * norm.pdf(x))
    assert gaussian_delta(mu, epsilon) == pytest.approx(float(np.trapezoid(excess, x)), rel=1e-6, abs=1e-15)


@given(st.floats(0.01, 20), st.floats(1e-12, 0.1))
def test_epsilon_and_mu_are_inverse(epsilon: float, delta: float) -> None:
    mu = gaussian_mu(epsilon, delta)
    assert gaussian_epsilon(mu, delta) == pytest.approx(epsilon, rel=1e-6)


def test_no_releases_spend_nothing_and_little_enough_is_epsilon_0() -> None:
    assert Ledger().epsilon(1e-5) == 0
    assert Ledger.of([Event(1.0, 0)]).epsilon(1e-5) == 0
    assert gaussian_epsilon(1e-6, 1e-5) == 0


def test_gaussian_releases_add_mu_squared_as_dp_accounting_has_it() -> None:
    ledger = Ledger.of([Event(1.7, 8), Event(4.0)])
    assert ledger.mu == pytest.approx(math.sqrt(8 / 1.7**2 + 1 / 16))
    reference = dp.get_epsilon_gaussian(1 / ledger.mu, 1e-5)
    assert ledger.epsilon(1e-5) == pytest.approx(reference, rel=1e-6)


def prv_epsilon(sampling: float, noise: float, count: int, delta: float) -> tuple[float, float, float]:
    """(lower, estimate, upper) of Microsoft's prv-accountant (Gopi et al. 2021)."""
    from prv_accountant import PRVAccountant
    from prv_accountant.privacy_random_variables import PoissonSubsampledGaussianMechanism

    accountant = PRVAccountant(
        prvs=[PoissonSubsampledGaussianMechanism(noise_multiplier=noise, sampling_probability=sampling)],
        max_self_compositions=[count],
        eps_error=0.05,
        delta_error=delta / 1000,
    )
    lower, estimate, upper = accountant.compute_epsilon(delta=delta, num_self_compositions=[count])
    return float(lower), float(estimate), float(upper)


@pytest.mark.parametrize(
    ("sampling", "noise", "count"), [(0.1, 0.888, 80), (0.02, 0.7, 200), (0.1, 2.063, 80)]
)
def test_sampled_releases_agree_with_a_second_accountant(sampling: float, noise: float, count: int) -> None:
    ours = Ledger.of([Event(noise, count, sampling)]).epsilon(1e-5)
    _, estimate, _ = prv_epsilon(sampling, noise, count, 1e-5)
    assert ours == pytest.approx(estimate, rel=0.01)
    renyi = dp.rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation.ADD_OR_REMOVE_ONE)
    renyi.compose(
        dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(sampling, dp.GaussianDpEvent(noise)), count)
    )
    assert ours < renyi.get_epsilon(1e-5) < 1.5 * ours


def test_sampled_releases_agree_with_samples_of_the_dominating_pair() -> None:
    """delta = E[(1 - e^(epsilon - L))+] with L the loss of (1-q) N(0, s) + q N(1, s) against N(0, s)."""
    q, noise, count, epsilon = 0.1, 1.0, 20, 1.0
    generator = np.random.default_rng(0)
    loss = np.zeros(400_000)
    for _ in range(count):
        x = generator.normal(size=loss.size) * noise + (generator.random(loss.size) < q)
        loss += np.log1p(q * np.expm1((2 * x - 1) / (2 * noise**2)))
    gained = np.maximum(0, -np.expm1(epsilon - loss))
    delta, error = gained.mean(), gained.std() / math.sqrt(loss.size)
    ours = Ledger.of([Event(noise, count, q)]).epsilon(float(delta))
    slack = Ledger.of([Event(noise, count, q)]).epsilon(float(delta - 4 * error))
    assert ours <= slack
    assert ours == pytest.approx(epsilon, abs=max(0.01, abs(slack - ours)))


def test_sampled_and_plain_releases_compose() -> None:
    """No more than both apart, and no less than either."""
    sampled, plain = Event(1.5, 40, 0.1), Event(3.0)
    alone = [Ledger.of([event]).epsilon(5e-6) for event in (sampled, plain)]
    both = Ledger.of([sampled, plain]).epsilon(1e-5)
    assert max(Ledger.of([event]).epsilon(1e-5) for event in (sampled, plain)) < both < sum(alone)


@given(st.floats(0.1, 20), st.integers(1, 100))
def test_calibration_is_exact_and_safe(epsilon: float, count: int) -> None:
    z = calibrate(lambda z: [Event(z, count)], epsilon, 1e-5)
    assert z == pytest.approx(math.sqrt(count) / gaussian_mu(epsilon, 1e-5), rel=1e-6)
    assert Ledger.of([Event(z, count)]).epsilon(1e-5) <= epsilon


def test_calibration_of_poisson_sampling() -> None:
    """The figures of the specification: 80 rounds, 100 of 1,000 clients."""
    z = calibrate(lambda z: [Event(z, 80, 0.1)], 2, 1e-5)
    assert z == pytest.approx(2.06, abs=0.005)
    assert Ledger.of([Event(z, 80, 0.1)]).epsilon(1e-5) <= 2


@pytest.mark.parametrize(("noise", "count", "sampling"), [(0, 1, 1), (1, -1, 1), (1, 1, 0), (1, 1, 1.1)])
def test_impossible_events_are_refused(noise: float, count: int, sampling: float) -> None:
    with pytest.raises(ValueError, match="not an event"):
        Event(noise, count, sampling)
