"""Federated learning rate search by successive halving."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..aggregation.norm_limit import ChangeSize
from ..core.errors import AggregationError, DeploymentError, RunError, UpdateError
from ..core.files import read_json
from ..evaluation.metrics import is_better
from ..methods import UNFINISHED, Answer, State, peeked
from ..methods.tuning.parts import RATE_FACTOR
from ..recipe.recipe import Recipe
from ..training.settings import TRIAL_ROUNDS
from ..transport.protocol import Reply
from .norm_gate import NormGate
from .schedule import Assignment
from .simulation import Federation
from .state_check import check_aggregate


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

    def in_words(self, metric: str) -> str:
        """The rate, what was tried, and what that cost."""
        trials = ", ".join(
            f"{t.learning_rate:g}: {'failed' if t.score is None else f'{t.score:.4f}'} after {t.rounds}"
            for t in self.trials
        )
        return (
            f"learning rate {self.learning_rate:g} of {trials} rounds ({metric} on the development split; "
            f"{self.bytes_up + self.bytes_down:,} bytes, {self.seconds:.0f} s)"
        )


def learning_rate_in(directory: Path, recipe: Recipe) -> float:
    """The client's learning rate before the schedule, as the recipe says or a search in this run's directory
    found; 0 where nothing is trained by steps.
    """
    file = directory / "search.json"
    if recipe.training.search_rates and file.exists():
        return float(read_json(file)["learning_rate"])
    rate = recipe.training.learning_rate
    return rate if isinstance(rate, float) else 0.0


def search_rate(
    recipe: Recipe,
    state: State,
    plan: Sequence[Mapping[str, Assignment]],
    first: int,
    parties: Federation,
    tell: Callable[[str], None],
) -> Search:
    """The rate of ``training.search_rates`` with the best development score (Jamieson and Talwalkar 2016).

    Each trains from the same ``state`` and what clients remembered of it, with the cohorts of the rounds from
    ``first`` on; the better ones start again, since what clients remember of one rate would be overwritten
    by the next. What they remember of trials is forgotten. Discloses what as many rounds of training
    disclose.

    Raises:
        RunError: no rate gave a sound model.
    """
    metric, begun = recipe.metric, time.perf_counter()
    rates, usual = sorted(recipe.training.search_rates or ()), recipe.training.learning_rate
    assert isinstance(usual, float)
    left = rates
    trials: list[Trial] = []
    memories, spent, needed = parties.memories.snapshot(), [0, 0], recipe.rounds.min_clients

    def start_again() -> None:
        parties.memories.restore(first - 1, dict(memories[0]), dict(memories[1]))

    fits = recipe.training.rounds_of_head_fits(len(plan))
    training = [number for number in range(first, len(plan) + 1) if number not in fits]
    for part, length in enumerate(TRIAL_ROUNDS):
        scores: dict[float, float] = {}
        numbers = training[:length]
        for rate in left:
            tell(f"trying learning rate {rate:g}")
            start_again()
            trial = replace(state, values={**state.values, RATE_FACTOR: rate / usual})
            gate = NormGate(recipe.aggregation)
            try:
                for number in numbers:
                    trial = _round(trial, number, plan[number - 1], parties, spent, needed, gate)
                score = parties.evaluation.development(trial)[metric]
            except (RunError, AggregationError, UpdateError, DeploymentError):
                score = math.nan
            sound = math.isfinite(score)
            trials.append(Trial(rate, len(numbers), score if sound else None))
            if sound:
                scores[rate] = score
        if not scores:
            tried = ", ".join(f"{rate:g}" for rate in rates)
            raise RunError(
                f"training.learning_rate = 'auto': none of {tried} gives a sound model; set a lower rate"
            )
        sign = 1 if is_better(0.0, 1.0, metric) else -1
        ordered = sorted(scores, key=lambda rate: (sign * scores[rate], rate))  # the lower of two alike
        left = ordered[: 1 if part == len(TRIAL_ROUNDS) - 1 else max(1, len(rates) >> (part + 1))]
    start_again()
    return Search(left[0], trials, spent[0], spent[1], round(time.perf_counter() - begun, 3))


def _round(
    state: State,
    number: int,
    cohort: Mapping[str, Assignment],
    parties: Federation,
    spent: list[int],
    needed: int,
    gate: NormGate,
) -> State:
    """One round of a trial, as the loop makes one, with all its exchanges: far too large changes do not pass
    the ``gate``. Bytes up and down are added to ``spent``.

    Raises:
        RunError: fewer clients answered than are ``needed``.
        AggregationError, UpdateError: the aggregate cannot be trained from.
    """
    present = {name: a.amount for name, a in cohort.items() if not a.absent}
    answered: list[str] = []

    def sound(replies: Iterator[Reply]) -> Iterator[Answer]:
        merged: dict[str, ChangeSize] = {}
        for reply in gate.passed(replies, merged):
            spent[0] += reply.bytes_up
            spent[1] += reply.bytes_down
            if reply.update is not None:
                answered.extend(reply.clients or (reply.client,))
                yield Answer(reply.client, reply.task, reply.update, summed=reply.clients)

    while True:
        tasks = parties.method.configure(state, number, present)
        answered.clear()
        first, answers = peeked(sound(parties.transport.exchange(tasks, number)))
        if first is not None or UNFINISHED in state.values:
            state = parties.method.aggregate(state, answers).state
            check_aggregate(state)
        if len(answered) < max(1, min(needed, len(cohort))):
            raise RunError(f"round {number}: {len(answered)} clients answered")
        if UNFINISHED not in state.values:
            return state
        present = {name: present[name] for name in answered}
