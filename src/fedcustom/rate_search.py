"""A learning rate chosen by the federation: a few rounds at each of some rates, by successive halving."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .errors import RunError
from .evaluation.metrics import is_better
from .federation import Federation
from .methods import Answer, State
from .methods.tuning import RATE_FACTOR
from .recipe import Recipe
from .schedule import Assignment
from .transport.reply import Reply

Snapshot = tuple[dict[str, dict[str, Any]], dict[str, str]]

SEGMENTS = (2, 4)
"""Rounds that every rate is given, and then those that the better half is given further."""


@dataclass(frozen=True)
class Trial:
    """One rate: how many rounds it had, and the development score after them (None: it failed)."""

    learning_rate: float
    rounds: int
    score: float | None


@dataclass(frozen=True)
class Search:
    """What a search found, and what it cost: bytes to and from all clients, and seconds."""

    learning_rate: float
    trials: list[Trial]
    bytes_up: int
    bytes_down: int
    seconds: float

    def described(self) -> dict[str, Any]:
        """For ``search.json``."""
        return asdict(self)


def search_rounds(rates: int) -> int:
    """How many rounds a search over so many rates takes."""
    return sum(length * max(1, rates >> part) for part, length in enumerate(SEGMENTS))


def search_rate(
    recipe: Recipe,
    state: State,
    plan: Sequence[Mapping[str, Assignment]],
    first: int,
    parties: Federation,
    tell: Callable[[str], None],
) -> Search:
    """The rate of ``training.search_rates`` with the best development score (Jamieson and Talwalkar 2016).

    Each trains from the same ``state`` with the cohorts of the rounds from ``first`` on; what clients
    remember of it is forgotten. Discloses what as many rounds of training disclose.

    Raises:
        RunError: no rate gave a sound model.
    """
    metric, begun = recipe.metric, time.perf_counter()
    rates, usual = sorted(recipe.training.search_rates or ()), recipe.training.learning_rate
    assert isinstance(usual, float)
    left = {rate: replace(state, values={**state.values, RATE_FACTOR: rate / usual}) for rate in rates}
    trials: list[Trial] = []
    before, spent, done = parties.memories.snapshot(), [0, 0], 0
    remembered = dict.fromkeys(rates, before)

    def remember(after: int, memories: Snapshot) -> None:
        parties.memories.restore(after, dict(memories[0]), dict(memories[1]))

    fits = recipe.training.rounds_of_head_fits(len(plan))
    training = [number for number in range(first, len(plan) + 1) if number not in fits]
    for part, length in enumerate(SEGMENTS):
        scores: dict[float, float] = {}
        numbers = training[done : done + length]
        for rate in list(left):
            tell(f"trying learning rate {rate:g}")
            remember(numbers[0] - 1 if numbers else first - 1, remembered[rate])
            try:
                for number in numbers:
                    left[rate] = _round(left[rate], number, plan[number - 1], parties, spent)
                score = parties.evaluation.development(left[rate])[metric]
            except RunError:
                score = math.nan
            remembered[rate] = parties.memories.snapshot()
            sound = math.isfinite(score)
            trials.append(Trial(rate, done + len(numbers), score if sound else None))
            if sound:
                scores[rate] = score
        if not scores:
            tried = ", ".join(f"{rate:g}" for rate in rates)
            raise RunError(
                f"training.learning_rate = 'auto': none of {tried} gives a sound model; set a lower rate"
            )
        sign = 1 if is_better(0.0, 1.0, metric) else -1
        ordered = sorted(scores, key=lambda rate: (sign * scores[rate], rate))  # the lower of two alike
        keep = 1 if part == len(SEGMENTS) - 1 else max(1, len(rates) >> (part + 1))
        left, done = {rate: left[rate] for rate in ordered[:keep]}, done + len(numbers)
    remember(first - 1, before)
    (best,) = left
    return Search(best, trials, spent[0], spent[1], round(time.perf_counter() - begun, 3))


def _round(
    state: State, number: int, cohort: Mapping[str, Assignment], parties: Federation, spent: list[int]
) -> State:
    """One round of a trial; bytes up and down are added to ``spent``.

    Raises:
        RunError: no client answered, or merging failed.
    """
    present = {name: a.amount for name, a in cohort.items() if not a.absent}
    tasks = parties.method.ask(state, number, present)

    def sound(replies: Iterator[Reply]) -> Iterator[Answer]:
        for reply in replies:
            spent[0] += reply.bytes_up
            spent[1] += reply.bytes_down
            if reply.update is not None:
                yield Answer(reply.client, reply.task, reply.update)

    answers = list(sound(parties.transport.exchange(tasks, f"{number:06d}")))
    if not answers:
        raise RunError(f"round {number}: no client answered")
    return parties.method.merge(state, answers)
