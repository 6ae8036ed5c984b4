"""Accounting: what a run's noised releases reveal together, as (epsilon, delta).

Neighbours differ in one unit, a client or a training row, whose contributions are replaced by zeros. Releases
of Gaussian noise alone compose exactly, their mu^2 add (Dong et al. 2022, *Gaussian differential privacy*);
with Poisson sampling the privacy loss distribution is composed by Google's dp-accounting, whose estimate is
from above. Releases of integers with Skellam noise are composed by Renyi divergences
(:mod:`fedcustom.privacy.renyi`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from scipy.optimize import brentq
from scipy.special import log_ndtr

from ..core.errors import RecipeError
from . import renyi

PRECISE, COARSE = 1e-9, 1e-4
"""Relative precision to which noise is calibrated: of the exact curve, and of loss distributions."""

FEW, WIDE, NARROW = 500, 1e-3, 1e-4
"""Releases up to which losses are rounded (upwards) to the wider interval: ten times faster, and of 80
releases epsilon is larger by 3e-5 of itself."""

MOST_NOISE = 1e6
"""Noise multiplier beyond which none is looked for."""


@dataclass(frozen=True)
class Event:
    """``count`` releases of sums with Gaussian noise of ``noise_multiplier`` times the sensitivity to one
    unit, which takes part in each with probability ``sampling`` (Poisson; 1: always). With ``variance`` the
    sums are of integers, and the noise is Skellam noise of this variance at least.
    """

    noise_multiplier: float
    count: int = 1
    sampling: float = 1.0
    variance: float | None = None

    def __post_init__(self) -> None:
        if not self.noise_multiplier > 0 or self.count < 0 or not 0 < self.sampling <= 1:
            raise ValueError(f"{self}: not an event")
        if self.variance is not None and not (self.variance > 0 and self.sampling == 1):
            raise ValueError(f"{self}: not an event")

    @property
    def is_gaussian(self) -> bool:
        """Whether no sampling is involved, and no integers."""
        return self.sampling == 1 and self.variance is None

    def renyi(self, orders: renyi.Floats) -> renyi.Floats:
        """A bound on the Renyi divergence of whole orders, without sampling. Integers are at most as large as
        their squares, so that one unit moves a vector of them by no more in the 1-norm than in the squared
        2-norm, however long it is.
        """
        if self.variance is None:
            return self.count * orders / (2 * self.noise_multiplier**2)
        squared = self.variance / self.noise_multiplier**2
        return self.count * renyi.skellam_renyi(orders, math.sqrt(squared), squared, self.variance)


@dataclass(frozen=True)
class Ledger:
    """Releases so far."""

    events: tuple[Event, ...] = ()

    @classmethod
    def of(cls, events: Iterable[Event]) -> Ledger:
        """Those that are one at least."""
        return cls(tuple(event for event in events if event.count))

    def after(self, *events: Event) -> Ledger:
        """With these added."""
        return Ledger.of((*self.events, *events))

    @property
    def mu(self) -> float | None:
        """The mu of Gaussian differential privacy; None where sampling or integers are involved."""
        if all(event.is_gaussian for event in self.events):
            return math.sqrt(sum(event.count / event.noise_multiplier**2 for event in self.events))
        return None

    def epsilon(self, delta: float) -> float:
        """Epsilon at this delta, 0 of no events.

        Raises:
            RecipeError: sampling is involved, and dp-accounting is not installed.
        """
        if not self.events:
            return 0.0
        if (mu := self.mu) is not None:
            return gaussian_epsilon(mu, delta)
        if all(event.sampling == 1 for event in self.events):
            return renyi.epsilon_of(self._renyi, delta)
        if any(event.variance is not None for event in self.events):
            raise ValueError("releases of integers and sampled ones are not composed")
        return _sampled_epsilon(self.events, delta)

    def _renyi(self, orders: renyi.Floats) -> renyi.Floats:
        total = orders * 0.0
        for event in self.events:
            total += event.renyi(orders)
        return total


@dataclass(frozen=True)
class Guarantee:
    """What is promised: whatever follows from the releases changes in probability by a factor e^``epsilon``
    at most, up to ``delta``, if one ``unit`` had contributed nothing. ``assumptions`` must hold for it;
    ``valid`` is false where one is known not to.
    """

    unit: str
    epsilon: float
    delta: float
    valid: bool
    assumptions: tuple[str, ...] = ()


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Delta of the Gaussian mechanism with sensitivity over noise ``mu`` (Balle and Wang 2018, theorem 8)::

    Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu)
    """
    if mu == 0:
        return 0.0
    upper = log_ndtr(mu / 2 - epsilon / mu)
    lower = epsilon + log_ndtr(-mu / 2 - epsilon / mu)
    return max(0.0, math.exp(upper) * -math.expm1(min(0.0, lower - upper)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of the Gaussian mechanism with sensitivity over noise ``mu`` at this ``delta``."""
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    high = 1.0
    while gaussian_delta(mu, high) > delta:
        high *= 2
    return float(brentq(lambda epsilon: gaussian_delta(mu, epsilon) - delta, 0.0, high, xtol=1e-12))


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The largest mu whose Gaussian mechanism is (``epsilon``, ``delta``)-private."""
    high = 1.0
    while gaussian_delta(high, epsilon) < delta:
        high *= 2
    return float(brentq(lambda mu: gaussian_delta(mu, epsilon) - delta, 1e-12, high, xtol=1e-14))


def calibrate(events: Callable[[float], Iterable[Event]], epsilon: float, delta: float) -> float:
    """The least noise multiplier z, to a relative precision of 1e-9 (1e-4 where sampling is involved), at
    which ``events(z)`` are (``epsilon``, ``delta``)-private. It errs to the safe side.

    Raises:
        RecipeError: no noise is enough: what does not depend on z reveals more already.
    """

    def enough(z: float) -> bool:
        return Ledger.of(events(z)).epsilon(delta) <= epsilon

    exact = all(event.sampling == 1 for event in events(1.0))
    low = high = 1.0
    while not enough(high):
        low, high = high, 2 * high
        if high > MOST_NOISE:
            raise RecipeError(f"privacy.epsilon = {epsilon}: no noise below {MOST_NOISE:g} is enough")
    while low == high or enough(low):
        low, high = low / 2, low
        if low < 1 / MOST_NOISE:
            return high
    while high / low > 1 + (PRECISE if exact else COARSE):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _sampled_epsilon(events: tuple[Event, ...], delta: float) -> float:
    try:
        import dp_accounting as dp
    except ModuleNotFoundError:
        raise RecipeError(
            "[privacy]: sampling is accounted for by the package dp-accounting: "
            "pip install 'fedcustom[privacy]'"
        ) from None
    interval = WIDE if sum(event.count for event in events) <= FEW else NARROW
    accountant = dp.pld.PLDAccountant(
        dp.NeighboringRelation.REPLACE_SPECIAL, value_discretization_interval=interval
    )
    for event in events:
        release = dp.GaussianDpEvent(event.noise_multiplier)
        sampled = release if event.is_gaussian else dp.PoissonSampledDpEvent(event.sampling, release)
        accountant.compose(dp.SelfComposedDpEvent(sampled, event.count))
    return float(accountant.get_epsilon(delta))
