"""The attack ``canaries``: clients with vectors that are known, and how far the noise hides them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..core.tensors import Tensors
from ..methods import State, WeightTuning
from ..methods.tuning.release import ClientRelease, bounds_of
from ..methods.tuning.server import released_tensors
from ..privacy.accounting import gaussian_epsilon
from ..privacy.client_mechanism import ClientMechanism
from ..privacy.clipping import groups_of
from ..privacy.noise import NoiseKey
from ..training.local import schedule_factor
from .attack import CannotAttack, Deadline, OutOfTime, RoundKind, RoundView, Target
from .results import Finding, View
from .statistics import epsilon_bound, gaussian_separation

CANARIES = 200
"""Canaries that take part, where there are as many clients; as many others are drawn and do not."""

FEWEST = 10
"""Clients that canaries can take the places of."""

SUPPORT = 20_000
"""Numbers of each group in which a canary is not zero, at most: enough for two to be nearly orthogonal."""

LENGTH = 100.0
"""A canary's length in units of the bound, so that what is not cut is found."""

CONFIDENCE = 0.999
"""Of the lower bound. The mechanism's own noise is just what it promises and the attack is the best there
is, so that a bound at 95 % would accuse one sound run in twenty.
"""

GUESSED = 0.5
"""The share of the canaries, the surest, of which a bound without normal noise guesses."""


class Canaries:
    """Adds canary clients to the releases of a private run's mechanism: each sends the same random direction
    whenever it is its turn, all other clients nothing, and no model is trained. The statistic of a canary is
    the inner product of what it contributed with what was released, both multiplied by the strategy matrix
    so that noise is independent from round to round.

    One-shot canaries of Andrew et al. 2023, *One-shot Empirical Privacy Estimation for Federated Learning*
    (arXiv 2302.03098), by whom the cosine with random directions is near normal. Their epsilon is an estimate
    from moments; here the statistic's distance in standard deviations has a confidence bound, and the
    standard deviation is measured, by canaries that did not take part, not taken from the mechanism.
    """

    name = "canaries"
    views: tuple[View, ...] = ("state difference",)
    kinds: tuple[RoundKind, ...] = ("finished",)
    source = "one-shot random canaries (Andrew et al. 2023, arXiv 2302.03098)"

    def inapplicable(self, target: Target) -> str | None:
        """Where no server noises what clients sent."""
        if target.private is None:
            return "no noise hides clients (privacy.unit = 'client')"
        if target.private.mechanism.by_clients:
            return "clients add the noise themselves (privacy.noise)"
        return None

    def attack(self, target: Target, seen: RoundView, deadline: Deadline) -> list[Finding]:
        """The distance of canaries that took part, in standard deviations, and the epsilon that it implies.

        Raises:
            CannotAttack: the method trains no tensors, or there are too few clients.
            OutOfTime: the releases would take longer than is left.
        """
        private, method = target.private, target.method
        if private is None or private.key is None or not isinstance(method, WeightTuning):
            raise CannotAttack(self.inapplicable(target) or "the method trains no tensors")
        sampled = private.mechanism.participation.probability < 1
        key = NoiseKey.fresh() if private.key.secret else private.key
        found = statistics_of(
            ReleaseOf.of(method, seen.before, private.mechanism, key, target.recipe.seed), deadline
        )
        members, others = found.members, found.others
        apart, least = gaussian_separation(members, others, CONFIDENCE, found.shares)
        promised = private.mechanism.ledger(
            private.mechanism.participation.rounds, private.mechanism.head_fits
        ).mu
        count, delta = len(members), target.delta
        if sampled:
            epsilon, confidence = _by_guesses(members, others, delta), 0.95
            assumed = "no assumption on the noise"
        else:
            epsilon, confidence = gaussian_epsilon(least, delta), CONFIDENCE
            assumed = f"assumes normal noise; estimate {gaussian_epsilon(max(0.0, apart), delta):.2f}"
        said = (
            f"canaries are {apart:.2f} standard deviations from clients that took no part"
            + (f", {promised:.2f} by the accounting" if promised is not None else "")
            + f"; epsilon at least {epsilon:.2f} ({assumed}); mechanism alone, with noise of its own"
        )
        return [
            Finding(
                self.name, self.views[0], 0, "canaries told from others",
                _accuracy(members, others), 0.5, 2 * count, 2 * count,
                said, epsilon=epsilon, confidence=confidence,
            )
        ]  # fmt: skip


@dataclass(frozen=True)
class ReleaseOf:
    """The releases of a mechanism for canaries in place of clients.

    ``factors`` are the schedule's of the rounds that train, by number; ``sums`` the forms of a client's sums
    for the head. ``tensors`` are what travels, of which ``head`` is bounded apart.
    """

    mechanism: ClientMechanism
    key: NoiseKey
    tensors: Tensors
    head: frozenset[str]
    factors: Mapping[int, float]
    fits: tuple[int, ...]
    sums: Tensors
    seed: int

    @classmethod
    def of(
        cls, method: WeightTuning, state: State, mechanism: ClientMechanism, key: NoiseKey, seed: int
    ) -> ReleaseOf:
        """Those of a method, from its first state."""
        parts = method.server.parts
        context, fits = parts.context, tuple(sorted(parts.head_rounds))
        rounds = range(1, context.rounds + 1)
        factors = {n: schedule_factor(context.training, n, context.rounds) for n in rounds if n not in fits}
        sums: Tensors = {}
        if fits:
            layer = method.client.head.layer
            sums = {"counts": torch.zeros(layer.classes), "totals": torch.zeros(layer.classes, layer.width)}
        tensors = released_tensors(parts, state.tensors)
        return cls(mechanism, key, tensors, frozenset(parts.trainable.head), factors, fits, sums, seed)

    @property
    def release(self) -> ClientRelease:
        """What the server releases by, from its first round on."""
        return ClientRelease(self.mechanism, self.key, self.fits)

    @property
    def groups(self) -> dict[str, list[str]]:
        """The names of tensors by group."""
        return groups_of(self.tensors, self.head)


@dataclass(frozen=True)
class Statistics:
    """Of canaries that take part and of as many that do not, (canaries,) each; by the mechanism's own account
    with standard deviation 1. ``shares`` is the distance that this account gives a canary with its turns,
    over that of the client of which most is seen; the last turns of a client are covered by less noise that
    is taken back later, so that less of them is seen.
    """

    members: np.ndarray
    others: np.ndarray
    shares: np.ndarray


def statistics_of(release: ReleaseOf, deadline: Deadline) -> Statistics:
    """The statistics of canaries.

    Raises:
        CannotAttack: there are too few clients for canaries.
        OutOfTime: by the first round, the others would take longer than is left.
    """
    clients = release.mechanism.participation.clients
    count = min(CANARIES, clients)
    if count < FEWEST:
        raise CannotAttack(f"{clients} clients are too few for canaries: at least {FEWEST}")
    scores, squares = np.zeros(2 * count), np.zeros(2 * count)
    for weights, products, deviation in _trained(release, count, deadline):
        scores += weights * products / deviation**2
        squares += weights**2 * len(release.groups) / deviation**2
    for products, deviation in _fitted(release, count, deadline):
        scores += products / deviation**2
        squares += 1 / deviation**2
    seen = squares > 0
    scores[seen] /= np.sqrt(squares[seen])
    some = seen[:count]
    if not some.any():
        raise CannotAttack("no canary had a turn")
    shares = np.sqrt(squares[:count] / squares.max())
    return Statistics(scores[:count][some], scores[count:][some], shares[some])


def _turns(release: ReleaseOf, count: int) -> list[list[int]]:
    """The canaries of each round that trains, of those that take part: clients chosen at random."""
    participation = release.mechanism.participation
    order = np.random.default_rng([release.seed, 41]).permutation(participation.clients)
    place = {int(client): number for number, client in enumerate(order[:count])}
    every = participation.cohorts(release.seed, release.key)
    return [[place[client] for client in cohort if client in place] for cohort in every]


def _trained(
    release: ReleaseOf, count: int, deadline: Deadline
) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
    """Of each row of C (X + C^-1 Z), in units of the bounds: how much each canary would have in it, the inner
    products of all directions with it, and the deviation of its noise.

    A canary that takes no part is weighed by the turns of one that does. Where turns are drawn by a secret
    key, nobody knows them, and all rounds weigh alike.
    """
    mechanism, groups, rounds = release.mechanism, release.groups, release.release
    own = _Directions.drawn(groups, release.tensors, 2 * count, [release.seed, 40])
    turns, c, state = _turns(release, count), mechanism.coefficients, State({})
    deviation = mechanism.sum_noise(len(groups), sum(_is_adaptive(mechanism, g) for g in groups))
    rows: list[dict[str, Tensor]] = []
    began, last = time.monotonic(), len(release.factors) - 1
    for place, (number, factor) in enumerate(release.factors.items()):
        deadline.check()
        bounds = bounds_of(mechanism.settings, factor, state.values)
        change, values = rounds.mean(
            (own.tensors(canary, {g: LENGTH * b.size for g, b in bounds.items()}) for canary in turns[place]),
            state, travelling=release.tensors, trained=list(release.tensors), head=release.head,
            round_number=number, factor=factor,
        )  # fmt: skip
        state = State({}, {}, {**state.values, **values})
        unit = {g: mechanism.participation.expected / bounds[g].size for g in groups}
        rows = [*rows, {g: unit[g] * flat for g, flat in own.parts(change).items()}][-len(c) :]
        recent = list(zip(c, reversed(rows), strict=False))
        whitened = {g: torch.stack([factor * row[g] for factor, row in recent]).sum(dim=0) for g in groups}
        weights = np.zeros(count)
        for back, coefficient in enumerate(c[: place + 1]):
            weights[turns[place - back]] += coefficient
        if mechanism.participation.probability < 1:
            weights = np.ones(count)
        yield np.tile(weights, 2), own.products(whitened), deviation
        if place == 0 and deadline.fitting(time.monotonic() - began, last) < last:
            raise OutOfTime


def _fitted(release: ReleaseOf, count: int, deadline: Deadline) -> Iterator[tuple[np.ndarray, float]]:
    """Of the noised sums that a head is fitted to, in units of their bound: the inner products of all
    directions with them, and the deviation of the noise.
    """
    if not release.fits:
        return
    size = release.mechanism.settings.head_clip
    own = _Directions.drawn({"sums": list(release.sums)}, release.sums, 2 * count, [release.seed, 42])
    for number in release.fits:
        deadline.check()
        sent = (own.tensors(canary, {"sums": LENGTH * size}) for canary in range(count))
        sums, deviation = release.release.head_sums(sent, release.sums, number)
        yield own.products(own.parts(sums)) / size, deviation / size


@dataclass(frozen=True)
class _Directions:
    """Random directions, of norm 1 in each group: in which numbers of a group, (support,), and the values,
    (directions, support).
    """

    groups: Mapping[str, Sequence[str]]
    forms: Tensors
    places: Mapping[str, Tensor]
    values: Mapping[str, Tensor]

    @classmethod
    def drawn(
        cls, groups: Mapping[str, Sequence[str]], forms: Tensors, count: int, seed: Sequence[int]
    ) -> _Directions:
        """So many directions."""
        draw = np.random.default_rng(seed)
        places, values = {}, {}
        for group, names in groups.items():
            size = sum(forms[name].numel() for name in names)
            chosen = np.sort(draw.choice(size, min(size, SUPPORT), replace=False))
            drawn = torch.from_numpy(draw.standard_normal((count, len(chosen)), dtype=np.float32))
            places[group] = torch.from_numpy(chosen)
            values[group] = torch.nn.functional.normalize(drawn.double(), dim=1).float()
        return cls(groups, forms, places, values)

    def tensors(self, canary: int, lengths: Mapping[str, float]) -> Tensors:
        """One direction as tensors, so long in each group."""
        found: Tensors = {}
        for group, names in self.groups.items():
            sizes = [self.forms[name].numel() for name in names]
            flat = torch.zeros(sum(sizes))
            flat[self.places[group]] = lengths[group] * self.values[group][canary]
            for name, piece in zip(names, torch.split(flat, sizes), strict=True):
                found[name] = piece.reshape(self.forms[name].shape)
        return found

    def parts(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of tensors, the numbers in which directions are not zero, by group, (support,)."""
        return {
            group: torch.cat([tensors[name].flatten() for name in names])[self.places[group]].double()
            for group, names in self.groups.items()
        }

    def products(self, parts: Mapping[str, Tensor]) -> np.ndarray:
        """The inner products of all directions with such numbers, (directions,)."""
        total = sum(self.values[group] @ flat.float() for group, flat in parts.items())
        assert isinstance(total, Tensor)
        return np.asarray(total.double())


def _is_adaptive(mechanism: ClientMechanism, group: str) -> bool:
    settings = mechanism.settings
    return (settings.clip_head if group == "head" else settings.clip) == "adaptive"


def _accuracy(members: np.ndarray, others: np.ndarray) -> float:
    """How many of both are on their side of the middle."""
    middle = (members.mean() + others.mean()) / 2
    return float(((members > middle).mean() + (others <= middle).mean()) / 2)


def _by_guesses(members: np.ndarray, others: np.ndarray, delta: float) -> float:
    """A bound without an assumption on the noise: in pairs of one canary that took part and one that did not,
    it is a fair coin which is which. The one that did is replaced by nothing.
    """
    differences = members - others
    number = max(1, int(GUESSED * len(differences)))
    surest = np.argsort(-np.abs(differences), kind="stable")[:number]
    correct = int((differences[surest] > 0).sum())
    return epsilon_bound(correct, number, len(differences), delta, swapped=True)
