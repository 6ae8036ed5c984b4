"""The attack ``membership``: was this text among those that the released model was trained on?"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..core.errors import FedcustomError
from ..data.examples import ClientData, Example
from ..methods import UNFINISHED, Answer, Client, State, WeightTuning, Work
from .attack import CannotAttack, Deadline, OutOfTime, RoundKind, RoundView, Target
from .results import Finding, View
from .statistics import auc, bootstrap, true_positives

MOST = 1000
"""Members, and others, that are candidates at most."""

FEWEST = 20
"""Of each, that an attack needs."""

REFERENCES = 4
"""Reference models, in pairs that were trained on complementary halves; two where time is short."""

FALSE_POSITIVES = (0.01, 0.001)
"""Shares of others that may be taken for members, where the members that are found are counted."""

Rounds = Mapping[int, Sequence[str]]
"""The clients of each round, by its number."""


class Membership:
    """RMIA (Zarifzadeh, Liu and Shokri 2024, *Low-Cost High-Power Membership Inference Attacks*, arXiv
    2312.03262): the released model's probability of a text's label over the mean of reference models', and
    the score is the share of held-out texts whose ratio is no larger (their gamma is 1). Of generators, the
    mean probability of a target's token takes the place of the label's.

    Candidates are texts of clients that took part, and as many held-out ones, of the development split where
    that was drawn from the clients' rows, else of the test split. A reference model is trained by the run's
    own method and clients on a random half of all candidates and other rows, so that each candidate is in
    half of the references, member or not. Where time is short, references take part of the run's rounds.
    """

    name = "membership"
    views: tuple[View, ...] = ("released model",)
    kinds: tuple[RoundKind, ...] = ("finished",)
    source = "RMIA (Zarifzadeh et al. 2024, arXiv 2312.03262)"

    def inapplicable(self, target: Target) -> str | None:
        """Where there is no released model of trained tensors, or what it says has no probability."""
        if not isinstance(target.method, WeightTuning):
            return f"method {target.recipe.method.name} trains no tensors"
        if target.method.keeps_parts():
            return "clients keep parts of the model, so that no one model is released"
        if target.data.task.kind not in ("classification", "generation"):
            return f"not available for data.task = {target.data.task.kind!r}"
        return None

    def attack(self, target: Target, seen: RoundView, deadline: Deadline) -> list[Finding]:
        """AUC, and true positives at 1 % and 0.1 % false positives.

        Raises:
            CannotAttack: there are too few texts, or a reference model cannot be trained.
            OutOfTime: two references would take longer than is left.
        """
        sides = Sides.of(target, seen.answered)
        deadline.check()
        ratios = probabilities(target, seen.after, sides.texts)
        references, rounds = reference_models(target, seen.before, sides, deadline)
        total = np.zeros(len(sides.texts))
        for state in references:
            deadline.check()
            total += probabilities(target, state, sides.texts)
        ratios = ratios / np.maximum(total / len(references), 1e-12)
        members, others = scores(ratios[: len(sides.members)], ratios[len(sides.members) :])
        return self._findings(target, sides, members, others, len(references), rounds)

    def _findings(
        self,
        target: Target,
        sides: Sides,
        members: np.ndarray,
        others: np.ndarray,
        references: int,
        rounds: int,
    ) -> list[Finding]:
        area, many = auc(members, others), len(members) + len(others)
        low, high = bootstrap(auc, members, others, target.seed)
        verdict = "does not tell" if low <= 0.5 <= high else f"tells with AUC {area:.3f}"
        found = [
            Finding(
                self.name, self.views[0], 0, "AUC", area, 0.5, many, many,
                f"the model {verdict} whether a text was trained on; held-out texts of the {sides.split} "
                f"split, {references} references of {rounds} of {len(target.cohorts)} rounds",
                low, high,
            )
        ]  # fmt: skip
        for allowed in FALSE_POSITIVES:

            def measure(a: np.ndarray, b: np.ndarray, allowed: float = allowed) -> float:
                return true_positives(a, b, allowed)

            share, exact = measure(members, others), allowed * len(others) >= 1
            least, most = bootstrap(measure, members, others, target.seed)
            rule = f"{100 * allowed:g} %" if exact else f"none (fewer than {1 / allowed:.0f})"
            found.append(
                Finding(
                    self.name, self.views[0], 0, f"TPR at {100 * allowed:g} % FPR", share, allowed, many,
                    many,
                    f"{share:.1%} of {len(members)} members are found while {rule} of the others are taken "
                    "for members", min(least, share), max(most, share),
                )
            )  # fmt: skip
        return found


@dataclass(frozen=True)
class Sides:
    """Candidates: ``members`` with the client that each is of, and ``others``, of the held-out ``split``,
    each with a client that a reference model may have it from.
    """

    members: list[tuple[str, Example]]
    others: list[tuple[str, Example]]
    split: str

    @classmethod
    def of(cls, target: Target, took_part: Sequence[str]) -> Sides:
        """Drawn by the recipe's seed, as many of each.

        Raises:
            CannotAttack: there are too few.
        """
        data, draw = target.data, np.random.default_rng([target.seed, 50])
        drawn = target.recipe.data.development is None and bool(data.development)
        held, split = (data.development, "development") if drawn else (data.test, "test")
        trained = {e.text for name in took_part for e in data.clients[name].train}
        held = [e for e in {e.text: e for e in held}.values() if e.text not in trained]
        own = [(name, e) for name in took_part for e in data.clients[name].train]
        count = min(MOST, len(own), len(held))
        if count < FEWEST:
            raise CannotAttack(
                f"{len(own)} texts were trained on and {len(held)} are held out: at least {FEWEST} of each"
            )
        members = [own[i] for i in draw.permutation(len(own))[:count]]
        names = [took_part[i] for i in draw.integers(len(took_part), size=count)]
        others = [held[i] for i in draw.permutation(len(held))[:count]]
        return cls(members, list(zip(names, others, strict=True)), split)

    @property
    def texts(self) -> list[Example]:
        """Members, then others."""
        return [example for _, example in (*self.members, *self.others)]


def scores(members: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The share of held-out texts whose ratio is no larger than each one's own, itself left out; those that
    are larger than all are told apart by how much.
    """
    order = np.sort(others)
    inside = np.searchsorted(order, members, side="right") / len(order)
    beside = (np.searchsorted(order, others, side="right") - 1) / max(1, len(order) - 1)
    top = order[-1]
    inside = inside + np.maximum(0.0, members - top)
    return inside, beside


def probabilities(target: Target, state: State, texts: Sequence[Example]) -> np.ndarray:
    """What the model in a state gives each text's label, or a target's tokens in the geometric mean."""
    found = np.asarray(target.method.predict(state, list(texts), texts=False).scores, dtype=np.float64)
    if target.data.task.kind == "classification":
        shares = np.exp(found - found.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        return np.asarray(shares[np.arange(len(texts)), [each.label for each in texts]])
    return np.asarray(np.exp(-found[:, 0] / np.maximum(found[:, 1], 1)))


def reference_models(
    target: Target, origin: State, sides: Sides, deadline: Deadline
) -> tuple[list[State], int]:
    """Models that were trained on complementary halves in pairs, and of how many of the run's rounds.

    Raises:
        CannotAttack: one cannot be trained.
        OutOfTime: there is no time for two of them.
    """
    draw = np.random.default_rng([target.seed, 51])
    rounds, began = sorted(target.cohorts), time.monotonic()
    found: list[State] = []
    chosen, models = rounds, REFERENCES
    while len(found) < models:
        halves = _halves(target, sides, draw)
        for half in halves:
            state = origin
            place = 0
            while place < len(chosen):
                state = _round(target, state, chosen[place], half, deadline)
                place += 1
                if not found and place == 1:  # what follows depends on how long the first one took
                    steps = deadline.fitting(time.monotonic() - began, REFERENCES * len(rounds))
                    models = REFERENCES if steps >= REFERENCES * len(rounds) else 2
                    chosen = _some(rounds, target, max(1, steps // models), len(rounds))
                    if steps < 2:
                        raise OutOfTime
            found.append(state)
    return found, len(chosen)


def _some(rounds: Sequence[int], target: Target, count: int, every: int) -> list[int]:
    """So many of the rounds, the first and those at equal distances."""
    if count >= every:
        return list(rounds)
    places = np.unique(np.linspace(0, every - 1, count).round().astype(int))
    return [rounds[place] for place in places]


def _halves(
    target: Target, sides: Sides, draw: np.random.Generator
) -> tuple[dict[str, list[Example]], dict[str, list[Example]]]:
    """The rows of clients that took part, and the others of the candidates, in two random halves."""
    names = {name for cohort in target.cohorts.values() for name in cohort}
    rows = [(name, e) for name in sorted(names) for e in target.data.clients[name].train]
    first: dict[str, list[Example]] = {}
    second: dict[str, list[Example]] = {}
    every = [*rows, *sides.others]
    for (name, example), heads in zip(every, draw.integers(2, size=len(every)), strict=True):
        (first if heads else second).setdefault(name, []).append(example)
    return first, second


def _round(
    target: Target, state: State, number: int, rows: Mapping[str, list[Example]], deadline: Deadline
) -> State:
    """A round of the run once more, of clients with other rows."""
    method, training = target.method, target.recipe.training
    work = Work(epochs=training.local_epochs)
    if training.local_steps:
        work = Work(steps=training.local_steps)
    clients = {n: Client(n, ClientData(n, rows[n])) for n in target.cohorts[number] if rows.get(n)}
    if not clients:
        return state
    try:
        while True:
            tasks = method.configure(state, number, dict.fromkeys(clients, work))
            answers = []
            names, width = list(tasks), max(1, method.widest_cohort())
            for start in range(0, len(names), width):
                deadline.check()
                some = names[start : start + width]
                updates = method.execute_together([(tasks[n], clients[n]) for n in some])
                for name, update in zip(some, updates, strict=True):
                    if isinstance(update, Exception):
                        raise update
                    answers.append(Answer(name, tasks[name], update))
            state = method.aggregate(state, answers).state
            if UNFINISHED not in state.values:
                return state
            clients = {n: c for n, c in clients.items() if n in tasks}
    except FedcustomError as error:
        raise CannotAttack(f"a reference model cannot be trained: {error}") from None
