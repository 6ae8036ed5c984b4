"""Client-level differential privacy: noise, participation and guarantee of one run, worked out beforehand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..core.errors import RecipeError
from .accounting import Event, Guarantee, Ledger, calibrate, gaussian_mu
from .participation import Participation
from .settings import PrivacySettings
from .strategy import Coefficients, banded_toeplitz, remaining_noise, weights_in_last_state

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
    """

    settings: PrivacySettings
    participation: Participation
    coefficients: Coefficients
    noise_multiplier: float
    head_noise: float | None
    head_fits: int
    last_state_noise: float
    noise_share: float

    def ledger(self, training_rounds: int, head_fits: int) -> Ledger:
        """What so many first rounds have released."""
        participation = self.participation
        events = [
            Event(
                self.noise_multiplier, participation.turns_until(training_rounds), participation.probability
            )
        ]
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
        return Guarantee(
            "client",
            epsilon,
            delta_of(self.settings),
            self.settings.is_valid,
            (*ASSUMPTIONS, *sampled),
        )

    def noise_over_signal(self, numbers: int, groups: int = 2) -> float:
        """The length of the noise in the last state, in a group of so many numbers, over the length of what
        all rounds add if all clients agree in every round; they never do.
        """
        return self.noise_share * math.sqrt(numbers * groups)

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
) -> ClientMechanism:
    """The noise by which the recipe's guarantee holds.

    Args:
        settings: The recipe's section, with ``unit = "client"``.
        clients: How many there are.
        clients_per_round: How many of them take part in a round.
        factors: What the release of each training round is multiplied by (the schedule), (T,).
        momentum: The server's.
        head_fits: In how many further rounds the head is fitted.

    Raises:
        RecipeError: names the key that does not fit.
    """
    if (delta := delta_of(settings)) > 1 / (10 * clients):
        raise RecipeError(
            f"privacy.delta = {delta:g}: at most 1 / (10 clients) = {1 / (10 * clients):g} for {clients} "
            "clients; a larger one would allow a client to be published now and then"
        )
    participation = Participation.of(settings.participation, clients, clients_per_round, len(factors))
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
