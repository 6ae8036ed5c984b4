"""Accounting of Skellam noise against the exact distribution of one number, and another library."""

from __future__ import annotations

import dp_accounting as dp
import numpy as np
import pytest
from scipy import stats
from scipy.special import logsumexp

from fedcustom.privacy.accounting import Event, Ledger, calibrate, gaussian_epsilon
from fedcustom.privacy.renyi import skellam_renyi
from fedcustom.privacy.sum_noise import SCALE

DELTA = 1e-5


def exact_renyi(order: int, shift: int, variance: float) -> float:
    """The divergence of a shifted Skellam distribution from the same at 0, by its probabilities."""
    reach = int(14 * variance**0.5 + order * shift + 60)
    numbers = np.arange(-reach, reach + 1)
    here = stats.skellam.logpmf(numbers, variance / 2, variance / 2)
    there = stats.skellam.logpmf(numbers - shift, variance / 2, variance / 2)
    sound = np.isfinite(here) & np.isfinite(there)
    return float(logsumexp(order * there[sound] + (1 - order) * here[sound])) / (order - 1)


@pytest.mark.parametrize("variance", [4.0, 30.0, 400.0])
@pytest.mark.parametrize("shift", [1, 2, 5])
def test_the_bound_is_above_the_exact_divergence_and_close(variance: float, shift: int) -> None:
    for order in (2, 3, 5, 9):
        bound = float(skellam_renyi(np.array([float(order)]), shift, shift, variance)[0])
        exact = exact_renyi(order, shift, variance)
        assert exact <= bound * (1 + 1e-9)
        if variance >= 30 * order:
            assert bound < 1.2 * exact + 1e-6


def exact_delta(shift: int, variance: float, epsilon: float) -> float:
    """Of one number that moves by ``shift``, whatever the mechanism is called."""
    numbers = np.arange(-int(20 * variance**0.5) - shift, int(20 * variance**0.5) + shift + 1)
    here = stats.skellam.pmf(numbers, variance / 2, variance / 2)
    there = stats.skellam.pmf(numbers - shift, variance / 2, variance / 2)
    return float(np.maximum(there - np.exp(epsilon) * here, 0).sum())


@pytest.mark.parametrize("z", [0.5, 1.0, 3.0])
def test_epsilon_holds_for_the_exact_distribution(z: float) -> None:
    """One release of one number of size 20, with noise of z times that."""
    shift = 20
    variance = (z * shift) ** 2
    epsilon = Ledger((Event(z, 1, variance=variance),)).epsilon(DELTA)
    assert exact_delta(shift, variance, epsilon) <= DELTA
    assert exact_delta(shift, variance, 0.8 * epsilon) > DELTA, "and little less does not"


@pytest.mark.parametrize(("z", "count"), [(0.8, 1), (1.8, 8), (6.0, 80), (40.0, 10)])
def test_another_accountant_agrees(z: float, count: int) -> None:
    """dp-accounting's conversion from the same divergences, at its own orders: ours has more of them."""
    event = Event(z, count, variance=(z * SCALE) ** 2)
    ours = Ledger((event,)).epsilon(DELTA)
    orders = np.arange(2.0, 4000.0)
    theirs, _ = dp.rdp.compute_epsilon(orders, event.renyi(orders), DELTA)
    assert ours <= theirs * (1 + 1e-9)
    assert ours > 0.9 * theirs
    accountant = dp.rdp.RdpAccountant([*np.arange(1.05, 64, 0.01), *np.arange(64.0, 4000.0)])
    accountant.compose(dp.SelfComposedDpEvent(dp.GaussianDpEvent(z), count))
    assert ours == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-2), "as normal noise"


@pytest.mark.parametrize("epsilon", [0.5, 2.0, 8.0])
def test_the_loss_against_normal_noise_of_the_same_variance(epsilon: float) -> None:
    """Six to twelve percent, all of it of Renyi accounting, where normal noise has an exact curve."""
    z = calibrate(lambda z: [Event(z, 8, variance=(z * SCALE) ** 2)], epsilon, DELTA)
    normal = gaussian_epsilon(8**0.5 / z, DELTA)
    assert 0.85 * epsilon < normal < 0.96 * epsilon
    assert Ledger((Event(z, 8, variance=(z * SCALE) ** 2),)).epsilon(DELTA) == pytest.approx(epsilon)


def test_what_is_composed() -> None:
    one = Event(2.0, 1, variance=1e9)
    assert Ledger((one, one)).epsilon(DELTA) == Ledger((Event(2.0, 2, variance=1e9),)).epsilon(DELTA)
    both = Ledger((one, Event(3.0)))
    assert both.mu is None
    assert both.epsilon(DELTA) > Ledger((one,)).epsilon(DELTA)
    with pytest.raises(ValueError, match="not composed"):
        Ledger((one, Event(2.0, 1, 0.1))).epsilon(DELTA)
    for more in ({"variance": 0.0}, {"variance": 1.0, "sampling": 0.5}):
        with pytest.raises(ValueError, match="not an event"):
            Event(1.0, 1, **more)
