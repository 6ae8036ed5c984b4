"""A guarantee in plain words: what it promises, to whom, what it rests on, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Iterator

from scipy.special import ndtr, ndtri

from .client_mechanism import ClientMechanism
from .record import NEVER_PROMISED
from .secure_sum.terms import Terms

NUMBERS = (1_000, 10_000, 100_000, 1_000_000)
"""Sizes of a group of trained tensors for which the noise is told."""

FALSE_ALARMS = 0.01
"""Share of clients that a test takes for members though they are not, at which its power is told."""


def most_found(mu: float) -> float:
    """The share of members that a test finds at most, with :data:`FALSE_ALARMS`, in a Gaussian release."""
    return float(ndtr(mu + ndtri(FALSE_ALARMS)))


def client_words(mechanism: ClientMechanism) -> Iterator[tuple[str, str]]:
    """Headings and sentences on a run with ``unit = "client"``."""
    guarantee, settings, turns = mechanism.guarantee(), mechanism.settings, mechanism.participation
    factor = math.exp(min(guarantee.epsilon, 700.0))
    released = "the model and of the states sent to clients"
    if mechanism.by_clients:
        sent = "the sums" if mechanism.terms is not None else "what clients send"
        released = f"{sent}, the model and the states sent to clients"
    yield (
        "promise",
        f"epsilon {guarantee.epsilon:.4g}, delta {guarantee.delta:g}, for each client: whatever anybody "
        f"makes of {released} is at most {factor:,.4g} times as likely as "
        f"if that client had sent nothing, and at least a {factor:,.4g}th, up to {guarantee.delta:g}",
    )
    for text in mechanism.against:
        yield "against", text
    ledger = mechanism.ledger(turns.rounds, mechanism.head_fits)
    if ledger.mu is not None:
        yield (
            "in a test",
            f"whoever decides whether a client took part, and is wrong on {FALSE_ALARMS:.0%} of those who "
            f"did not, finds at most {most_found(ledger.mu):.1%} of those who did",
        )
    if not guarantee.valid:
        yield "NOT VALID", "privacy.randomness = 'seeded': everybody can compute the noise and subtract it"
    yield "mechanism", _mechanism(mechanism)
    if mechanism.terms is not None:
        yield "noise", _own_noise(mechanism, mechanism.terms)
    elif mechanism.by_clients:
        yield "noise", "each client's own, enough for it alone; that of all clients of a round adds up"
    if mechanism.head_noise is not None:
        yield (
            "head",
            f"{mechanism.head_fits} noised release{'s' * (mechanism.head_fits != 1)} of counts and sums by "
            f"label, noise {mechanism.head_noise:.3f} times the bound of {settings.head_clip:g}",
        )
    yield (
        "noise over signal",
        "in the last state, if all clients agreed in every round (they never do): "
        + ", ".join(f"{mechanism.noise_over_signal(n):.3g} for {n:,} numbers" for n in NUMBERS),
    )
    for text in guarantee.assumptions:
        yield "assumes", text
    for text in NEVER_PROMISED:
        yield "never promised", text


def _own_noise(mechanism: ClientMechanism, terms: Terms) -> str:
    most = math.ceil(mechanism.participation.clients / mechanism.participation.groups)
    needed = terms.needed(most)
    return (
        f"made by the clients, of integers (Skellam): of {most} in a round {needed} have to stay, and the "
        f"noise of {needed - terms.colluding} of them is enough; normal noise of the same variance would "
        f"have epsilon {mechanism.gaussian_epsilon():.4g}"
    )


def _mechanism(mechanism: ClientMechanism) -> str:
    settings, turns = mechanism.settings, mechanism.participation
    clips = " and ".join(
        f"{group} {'scaled to norm 1' if kind == 'unit' else f'clipped ({kind})'}"
        for group, kind in (("tensors", settings.clip), ("head", settings.clip_head))
    )
    if turns.probability < 1:
        who = f"each of {turns.clients:,} clients with probability {turns.probability:.4g} in each round"
    elif turns.groups == 1:
        who = f"all {turns.clients:,} clients in each round"
    else:
        who = (
            f"{turns.groups:,} groups of {turns.expected:.4g} of {turns.clients:,} clients in turn, each "
            f"client in at most {turns.turns:,} of {turns.rounds:,} rounds"
        )
    bands = len(mechanism.coefficients)
    kind = "independent in each round" if bands == 1 else f"correlated over {bands} rounds"
    return (
        f"{who}; {clips}; noise of {mechanism.noise_multiplier:.3f} times the bound, {kind}, as much in the "
        f"last state as {mechanism.last_state_noise:.3f} of independent noise; sums are divided by "
        f"{turns.expected:.4g}, whoever answers"
    )
