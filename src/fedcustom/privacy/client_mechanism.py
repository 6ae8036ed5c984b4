"""Client-level differential privacy: noise, participation and guarantee of one run, worked out beforehand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..core.errors import RecipeError, SecureSumError
from .accounting import Event, Guarantee, Ledger, calibrate, gaussian_mu
from .participation import Participation
from .secure_sum.terms import LEAST_SITES, Terms
from .settings import PrivacySettings
from .strategy import Coefficients, banded_toeplitz, remaining_noise, weights_in_last_state
from .sum_noise import SCALE, SumNoise, factor_of

INDICATOR_NOISE = 5.0
"""Noise on the number of changes within an adaptive bound, over that on the sum (z)."""

LEAST_CLIENTS = 50.0
"""Clients of a round that an adaptive bound needs, over z: then its share is noised by a tenth."""

ASSUMPTIONS = (
    "the server, and whoever operates it, is trusted: it sees every client's change before noise is added",
    "nobody learns the key of the noise while the run lasts; it is deleted at the end",
    "each client has one name; what one person holds at several clients is hidden once for each",
)
"""What has to hold for the guarantee."""

SUM_ASSUMPTIONS = (
    "secure_sum.colluding = {colluding}: no more of a round's clients than that help the server, or tell "
    "anybody what noise they drew; all others add theirs",
    "across sites, whoever has the federation's authority/ makes no certificates for sites that there are "
    "not; a simulation has all parties in one process",
    "each client's own machine is trusted: noise is made there, by a key that never leaves it",
    "each client has one name; what one person holds at several clients is hidden once for each",
)
"""The same where clients add the noise."""

CLIENT_ASSUMPTIONS = SUM_ASSUMPTIONS[2:]
"""The same where each client adds enough noise by itself."""

LONGEST_NOISE = 100.0
"""Length of one client's own noise, over its bound, above which it has to be accepted by the recipe."""

ROUNDED_TO = 1e-6
"""To a multiple of which a calibrated noise multiplier is rounded up where each client works it out, so that
all have the same."""

SAMPLED = "nobody but the server knows which clients took part in which round (participation = 'poisson')"


@dataclass(frozen=True)
class ClientMechanism:
    """What a run with ``unit = "client"`` releases: in each training round the sum of its clients' bounded
    changes, in units of the bound, plus row t of C^-1 Z with Z of standard deviation ``noise_multiplier``
    times the square root of the number of groups; and ``head_fits`` times sums for the head, with
    ``head_noise`` times their bound.

    ``last_state_noise`` is the multiplier of independent noise that would leave as much in the last state.
    ``noise_share`` is what is left there in one number, over what all rounds would add to it if every
    client's change had norm 1 in that number alone.

    With ``terms`` clients add the noise themselves, as Skellam numbers, to changes that are summed by these
    terms (``noise = "sum"``); it is independent from round to round.
    """

    settings: PrivacySettings
    participation: Participation
    coefficients: Coefficients
    noise_multiplier: float
    head_noise: float | None
    head_fits: int
    last_state_noise: float
    noise_share: float
    terms: Terms | None = None

    def ledger(self, training_rounds: int, head_fits: int) -> Ledger:
        """What so many first rounds have released."""
        turns = self.participation.turns_until(training_rounds)
        if self.terms is not None:
            return Ledger.of([integer_event(self.noise_multiplier, turns)])
        events = [Event(self.noise_multiplier, turns, self.participation.probability)]
        if self.head_noise is not None:
            events.append(Event(self.head_noise, head_fits))
        return Ledger.of(events)

    def epsilon(self, training_rounds: int, head_fits: int) -> float:
        """What so many first rounds have spent, at the recipe's delta."""
        return self.ledger(training_rounds, head_fits).epsilon(delta_of(self.settings))

    def guarantee(self) -> Guarantee:
        """Of the whole run."""
        epsilon = self.epsilon(self.participation.rounds, self.head_fits)
        if self.settings.epsilon is not None:  # the calibration stops a trifle below
            epsilon = self.settings.epsilon
        sampled = (SAMPLED,) if self.participation.probability < 1 else ()
        rests_on: tuple[str, ...] = CLIENT_ASSUMPTIONS if self.by_clients else ASSUMPTIONS
        if self.terms is not None:
            rests_on = tuple(text.format(colluding=self.terms.colluding) for text in SUM_ASSUMPTIONS)
        return Guarantee(
            "client",
            epsilon,
            delta_of(self.settings),
            self.settings.is_valid,
            (*rests_on, *sampled),
        )

    @property
    def by_clients(self) -> bool:
        """Whether clients add the noise, so that the server need not be trusted."""
        return self.settings.place != "server"

    @property
    def against(self) -> tuple[str, ...]:
        """Whom the guarantee is against."""
        everybody = ("other clients", "whoever has the model")
        server = "the server, whether or not it follows the protocol"
        if self.terms is None:
            return (server, *everybody) if self.by_clients else everybody
        together = f"the server with clients that help it, up to {self.terms.colluding} in a round"
        # Without an allowance for it, a client that knows its own noise knows a part of all.
        return (server, together, *everybody) if self.terms.colluding else (server, "whoever has the model")

    def sum_noise_of(self, groups: int) -> SumNoise:
        """The noise that clients add, for so many groups of tensors.

        Raises:
            ValueError: they add none.
        """
        if self.terms is None:
            raise ValueError("the noise is the server's")
        return SumNoise(self.noise_multiplier, self.terms, groups)

    def gaussian_epsilon(self) -> float | None:
        """Epsilon of the whole run if the noise of integers were normal noise of the same variance."""
        turns = self.participation.turns
        normal = Ledger.of([Event(self.noise_multiplier, turns)])
        return None if self.terms is None else normal.epsilon(delta_of(self.settings))

    def noise_over_signal(self, numbers: int, groups: int = 2) -> float:
        """The length of the noise in the last state, in a group of so many numbers, over the length of what
        all rounds add if all clients agree in every round; they never do.
        """
        shorter = 1.0 if self.terms is None else SCALE / factor_of(numbers)
        return self.noise_share * math.sqrt(numbers * groups) * shorter

    def sum_noise(self, groups: int, adaptive: int = 0) -> float:
        """Standard deviation of Z, in units of the bounds, for so many groups; a part of the budget goes to
        the ``adaptive`` ones among them.
        """
        left = 1 - adaptive / (4 * INDICATOR_NOISE**2)
        return self.noise_multiplier * math.sqrt(groups / left)

    @property
    def indicator_noise(self) -> float:
        """Standard deviation of the noise on the number of changes within an adaptive bound."""
        return INDICATOR_NOISE * self.noise_multiplier


def client_mechanism(
    settings: PrivacySettings,
    *,
    clients: int,
    clients_per_round: int,
    factors: Sequence[float],
    momentum: float = 0.0,
    head_fits: int = 0,
    terms: Terms | None = None,
) -> ClientMechanism:
    """The noise by which the recipe's guarantee holds.

    Args:
        settings: The recipe's section, with ``unit = "client"``.
        clients: How many there are.
        clients_per_round: How many of them take part in a round.
        factors: What the release of each training round is multiplied by (the schedule), (T,).
        momentum: The server's.
        head_fits: In how many further rounds the head is fitted.
        terms: Of the secure sum, where clients add the noise (``noise = "sum"``).

    Raises:
        RecipeError: names the key that does not fit.
    """
    if (delta := delta_of(settings)) > 1 / (10 * clients):
        raise RecipeError(
            f"privacy.delta = {delta:g}: at most 1 / (10 clients) = {1 / (10 * clients):g} for {clients} "
            "clients; a larger one would allow a client to be published now and then"
        )
    participation = Participation.of(settings.participation, clients, clients_per_round, len(factors))
    if settings.place == "client":
        return _with_noise_each(settings, participation, factors, momentum)
    if terms is not None:
        return _with_own_noise(settings, participation, factors, momentum, terms)
    most = min(participation.groups, participation.rounds)
    if settings.bands is not None and settings.bands > most:
        raise RecipeError(
            f"privacy.bands = {settings.bands}: a client's turns are {most} rounds apart; at most {most}"
        )
    weights = weights_in_last_state(factors, momentum)
    coefficients = banded_toeplitz(weights, settings.bands or most)
    turns, probability = participation.turns, participation.probability
    head_noise: float | None = None
    if settings.noise_multiplier is not None:
        multiplier = settings.noise_multiplier
        if head_fits:
            spent = Ledger((Event(multiplier, turns, probability),))
            mu = spent.mu if spent.mu is not None else gaussian_mu(spent.epsilon(delta), delta)
            share = settings.head_share / (1 - settings.head_share)
            head_noise = math.sqrt(head_fits / share) / mu
    else:
        assert settings.epsilon is not None
        if head_fits:
            mu = gaussian_mu(settings.epsilon, delta)
            head_noise = math.sqrt(head_fits / settings.head_share) / mu
        head = [] if head_noise is None else [Event(head_noise, head_fits)]
        multiplier = calibrate(lambda z: [Event(z, turns, probability), *head], settings.epsilon, delta)
    _check_adaptive(settings, participation, multiplier)
    left = remaining_noise(weights, coefficients)
    return ClientMechanism(
        settings,
        participation,
        coefficients,
        multiplier,
        head_noise,
        head_fits,
        last_state_noise=multiplier * left,
        noise_share=multiplier
        * left
        * float((weights**2).sum() ** 0.5 / weights.sum())
        / participation.expected,
    )


def _with_own_noise(
    settings: PrivacySettings,
    participation: Participation,
    factors: Sequence[float],
    momentum: float,
    terms: Terms,
) -> ClientMechanism:
    """The mechanism of clients that add Skellam noise to what is summed."""
    delta, turns = delta_of(settings), participation.turns
    least = participation.clients // participation.groups
    most = math.ceil(participation.clients / participation.groups)
    try:
        needed = {count: terms.needed(count) for count in (least, most)}
    except SecureSumError as error:
        raise RecipeError(
            f"rounds.clients_per_round: of {participation.clients} clients the smallest round has {least}: "
            f"{error}; privacy.noise = 'sum' needs at least {LEAST_SITES} in each"
        ) from None
    if (multiplier := settings.noise_multiplier) is None:
        assert settings.epsilon is not None
        found = calibrate(lambda z: [integer_event(z, turns)], settings.epsilon, delta)
        multiplier = math.ceil(found / ROUNDED_TO) * ROUNDED_TO
    if not SumNoise(multiplier, terms).fits(most):
        raise RecipeError(
            f"privacy.{'epsilon' if settings.noise_multiplier is None else 'noise_multiplier'}: noise of "
            f"{multiplier:.4g} times the bound at each of {most} clients is more than sums of 32 bits hold "
            "(privacy.noise = 'sum'); promise less, or have more clients in each round"
        )
    weights = weights_in_last_state(factors, momentum)
    coefficients = banded_toeplitz(weights, 1)
    # All clients that answer add their noise, and not only those that have to.
    more = math.sqrt(max(count / (stay - terms.colluding) for count, stay in needed.items()))
    left = multiplier * more * remaining_noise(weights, coefficients)
    share = left * float((weights**2).sum() ** 0.5 / weights.sum()) / participation.expected
    return ClientMechanism(settings, participation, coefficients, multiplier, None, 0, left, share, terms)


def _with_noise_each(
    settings: PrivacySettings, participation: Participation, factors: Sequence[float], momentum: float
) -> ClientMechanism:
    """The mechanism of clients each of which adds normal noise that is enough for itself."""
    if (multiplier := settings.noise_multiplier) is None:
        assert settings.epsilon is not None
        turns, delta = participation.turns, delta_of(settings)
        multiplier = calibrate(lambda z: [Event(z, turns)], settings.epsilon, delta)
    weights = weights_in_last_state(factors, momentum)
    coefficients = banded_toeplitz(weights, 1)
    left = multiplier * math.sqrt(participation.expected) * remaining_noise(weights, coefficients)
    share = left * float((weights**2).sum() ** 0.5 / weights.sum()) / participation.expected
    return ClientMechanism(settings, participation, coefficients, multiplier, None, 0, left, share)


def integer_event(noise_multiplier: float, count: int) -> Event:
    """Releases of integers, whose noise has the least variance where there is one group of tensors."""
    return Event(noise_multiplier, count, variance=(noise_multiplier * SCALE) ** 2)


def delta_of(settings: PrivacySettings) -> float:
    """The recipe's delta, which a section with a unit has."""
    assert settings.delta is not None
    return settings.delta


def _check_adaptive(settings: PrivacySettings, participation: Participation, multiplier: float) -> None:
    """Refuse adaptive bounds where a client's turns are several rounds apart, or that noise would drive."""
    for key in ("clip", "clip_head"):
        if getattr(settings, key) != "adaptive":
            continue
        if participation.groups > 1:
            raise RecipeError(
                f"privacy.{key} = 'adaptive': needs privacy.participation = 'poisson', or all clients in "
                "each round; with cyclic groups use 'unit' or a number"
            )
        if participation.expected < LEAST_CLIENTS * multiplier:
            raise RecipeError(
                f"privacy.{key} = 'adaptive': {participation.expected:.0f} clients a round at noise "
                f"{multiplier:.3g}; at least {math.ceil(LEAST_CLIENTS * multiplier)} are needed, or noise "
                "would move the bound: use 'unit' or a number"
            )
