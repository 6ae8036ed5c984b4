"""Who works in each round, on how much, and from which state: planned before the first round begins, and
again when clients have told of their labels.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..core.errors import RecipeError
from ..data.examples import FederatedData
from ..data.many_clients import names_of, train_sizes
from ..methods.messages import Work
from ..recipe.recipe import Recipe
from ..simulation.settings import ParticipationSettings
from .balanced_cohorts import balanced_cohorts

EVERYONE = "centralised"
"""The name of the one client of a centralised run."""


@dataclass(frozen=True)
class Assignment:
    """What one client is to do: how much, from the state after which round, and whether it never answers."""

    amount: Work
    since: int
    absent: bool = False


Plan = list[dict[str, Assignment]]


def plan_rounds(
    recipe: Recipe,
    data: FederatedData,
    labels: Mapping[str, Sequence[int]] | None = None,
    turns: Sequence[Sequence[int]] | None = None,
) -> Plan:
    """The assignments of every round, by client. A pure function of the recipe, the clients and, where
    ``rounds.selection`` is balanced, of what they told of their ``labels`` when a head was fitted: how many
    examples of each they have. Before, and where nobody told, clients are drawn at random; one that did not
    tell counts as one that has none. A client of a balanced cohort makes an epoch in as many batches as any
    other: Adam's steps are alike in length, so that only then the clients' pulls towards their own labels are
    as strong as their weights in the mean, and cancel.

    A round has as many clients as ``rounds`` says (:meth:`~fedcustom.recipe.sections.RoundSettings.cohort`).
    A centralised run sees as many examples a round as the cohort of the federated run would; in a local run
    clients drawn at random work as long as in the federated one.

    ``turns`` are the places of the clients of each round that trains, in the order of these rounds, where
    they follow a scheme that privacy is accounted for by (:mod:`fedcustom.privacy.participation`).
    """
    names = names_of(data.clients)
    if recipe.baseline != "federated" or recipe.rounds.selection != "balanced":
        labels = None
    if recipe.participation.buffer is not None and recipe.baseline == "federated":
        plan = list(_buffered(recipe, names))
    else:
        plan = list(_synchronous(recipe, data, labels or {}, turns))
    if recipe.baseline == "centralised":
        return [_pooled(recipe, data, cohort) for cohort in plan]
    return [
        _with_partial_work(recipe, cohort, number, data) if recipe.baseline == "federated" else cohort
        for number, cohort in enumerate(plan, start=1)
    ]


def last_uses(plan: Plan) -> dict[int, int]:
    """Until which round the state after a round is needed to start from."""
    uses: dict[int, int] = {}
    for number, cohort in enumerate(plan, start=1):
        for assignment in cohort.values():
            uses[assignment.since] = number
    return uses


def _whole(recipe: Recipe) -> Work:
    training = recipe.training
    if training.local_steps:
        return Work(steps=training.local_steps)
    return Work(epochs=training.local_epochs)


def _synchronous(
    recipe: Recipe,
    data: FederatedData,
    labels: Mapping[str, Sequence[int]],
    turns: Sequence[Sequence[int]] | None,
) -> Iterator[dict[str, Assignment]]:
    names, last = names_of(data.clients), recipe.rounds.count
    size = recipe.rounds.cohort(len(names))
    fits = recipe.training.rounds_of_head_fits(last)
    waiting: list[list[int]] = []
    given = None if turns is None else iter(turns)
    for number in range(1, last + 1):
        generator, amount = np.random.default_rng([recipe.seed, 6, number]), _whole(recipe)
        if number in fits:
            chosen, waiting = _asked_to_fit(recipe, data, generator), []
        elif given is not None:
            chosen = list(next(given))
        elif labels and number > min(fits):
            waiting = waiting or balanced_cohorts(_table(recipe, names, labels), size, generator)
            chosen = waiting.pop()
            if amount.epochs is not None:
                amount = replace(amount, batches=_batches(recipe, labels))
        else:
            chosen = sorted(generator.choice(len(names), size=size, replace=False).tolist())
        yield {names[i]: Assignment(amount, number - 1) for i in chosen}


def _asked_to_fit(recipe: Recipe, data: FederatedData, generator: np.random.Generator) -> list[int]:
    """The places of the clients that are asked in a round that fits the head. Where they are some of natural
    clients, each next one is drawn in proportion to its training examples, as far as these are known: of
    clients with one row and others with hundreds, those say most. Across sites, whose rows are not known
    beforehand, all are alike.
    """
    asked = recipe.training.clients_of_head_fits(len(data.clients))
    sizes = np.array(train_sizes(data.clients), dtype=float)
    some = asked < len(sizes) and recipe.clients.partition == "natural"
    shares = sizes / sizes.sum() if some and np.count_nonzero(sizes) >= asked else None
    return sorted(generator.choice(len(sizes), size=asked, replace=False, p=shares).tolist())


def _batches(recipe: Recipe, labels: Mapping[str, Sequence[int]]) -> int:
    """In how many batches every client makes an epoch: as many as the mean client has, but no more than ten
    times the median one, for one client that claims many examples would have everybody make tiny steps.
    """
    examples = np.array([sum(counts) for counts in labels.values()], dtype=float)
    typical = min(float(examples.mean()), 10 * float(np.median(examples)))
    return max(1, math.ceil(typical / recipe.training.batch_size))


def _table(recipe: Recipe, names: Sequence[str], labels: Mapping[str, Sequence[int]]) -> np.ndarray:
    """What each label has of each client's weight in the mean, (clients, labels)."""
    nothing = [0] * len(next(iter(labels.values())))
    counts = np.array([labels.get(name, nothing) for name in names], dtype=float)
    if recipe.aggregation.weighting == "uniform":
        counts /= np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return counts


def _buffered(recipe: Recipe, names: Sequence[str]) -> Iterator[dict[str, Assignment]]:
    """FedBuff (Nguyen et al. 2022, algorithm 1): as many clients as a round has are always at work; whenever
    the buffer is full it is merged, and each client that has answered is replaced by another, which starts
    from the newest state.
    """
    settings, generator = recipe.participation, np.random.default_rng([recipe.seed, 10])
    size, buffer = recipe.rounds.cohort(len(names)), settings.buffer or 1
    positions = {name: i for i, name in enumerate(names)}
    working: list[tuple[float, int, int]] = []  # when it is done, client, the round it starts from
    busy: set[int] = set()

    def begin(now: float, version: int) -> None:
        idle = [i for i in range(len(names)) if i not in busy]
        if idle:
            client = int(generator.choice(idle))
            busy.add(client)
            heapq.heappush(working, (now + _latency(settings, generator), client, version))

    for _ in range(size):
        begin(0.0, 0)
    for number in range(1, recipe.rounds.count + 1):
        cohort: dict[str, Assignment] = {}
        answers = 0
        while answers < buffer and working:
            now, client, version = heapq.heappop(working)
            absent = bool(generator.random() < settings.dropout)
            cohort[names[client]] = Assignment(_whole(recipe), version, absent)
            answers += not absent
            if answers < buffer:
                begin(now, number - 1)
        if not answers:
            raise RecipeError(
                f"participation.dropout = {settings.dropout}: in round {number} nobody is left to answer; "
                "lower it, or have more clients than rounds.clients_per_round"
            )
        busy -= {positions[name] for name in cohort}
        for _ in range(size - len(working)):
            begin(now, number)
        yield dict(sorted(cohort.items(), key=lambda item: positions[item[0]]))


def _latency(settings: ParticipationSettings, generator: np.random.Generator) -> float:
    """A time with mean 1."""
    if settings.latency == "uniform":
        return float(generator.uniform(1 - settings.spread, 1 + settings.spread))
    if settings.latency == "exponential":
        return float(generator.exponential())
    if settings.latency == "lognormal":
        return float(generator.lognormal(-(settings.spread**2) / 2, settings.spread))
    return 1.0


def _with_partial_work(
    recipe: Recipe, cohort: Mapping[str, Assignment], number: int, data: FederatedData
) -> dict[str, Assignment]:
    """The cohort, in which some drop out and some do less. As many as must answer never drop out."""
    settings = recipe.participation
    if not settings.dropout and not settings.partial:
        return dict(cohort)
    generator = np.random.default_rng([recipe.seed, 7, number])
    lost = np.array([assignment.absent for assignment in cohort.values()])
    if settings.buffer is None:  # else who drops out was drawn when its answer was due
        lost |= generator.random(len(cohort)) < settings.dropout
    for position in generator.permutation(len(cohort)):
        if (~lost).sum() >= min(recipe.rounds.min_clients, len(cohort)):
            break
        lost[position] = False
    changed = {}
    for (name, assignment), absent in zip(cohort.items(), lost.tolist(), strict=True):
        amount, less, share = assignment.amount, generator.random(), generator.random()
        if less < settings.partial:
            share = settings.minimum_work + (1 - settings.minimum_work) * share
            amount = _share(amount, share, len(data.clients[name].train))
        changed[name] = Assignment(amount, assignment.since, absent)
    return changed


def _share(amount: Work, share: float, examples: int) -> Work:
    if amount.steps is not None:
        return Work(steps=max(1, math.floor(share * amount.steps)))
    assert amount.epochs is not None
    less = max(1, math.floor(share * amount.epochs * examples))
    return replace(amount, examples=less) if amount.batches is not None else Work(examples=less)


def _pooled(recipe: Recipe, data: FederatedData, cohort: Mapping[str, Assignment]) -> dict[str, Assignment]:
    """One client with all data that sees as many examples as the cohort would."""
    training = recipe.training
    sizes = [len(data.clients[name].train) for name in cohort]
    if training.local_steps:
        # A client with less than a batch makes its steps with what it has.
        examples = sum(training.local_steps * min(training.batch_size, count) for count in sizes)
    else:
        examples = sum(max(1, round(training.local_epochs * count)) for count in sizes)
    since = next(iter(cohort.values())).since
    return {EVERYONE: Assignment(Work(examples=examples), since)}
