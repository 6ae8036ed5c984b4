"""The attack ``candidates``: was this text in it? The cosine of a change and the text's own gradient."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..core.tensors import Tensors
from ..data.examples import Example
from .attack import UNSEEN, CannotAttack, Deadline, OutOfTime, RoundKind, RoundView, Target
from .changes import state_difference, summed_change
from .results import Finding, NotRun, View
from .statistics import auc, bootstrap, epsilon_bound, true_positives

MOST_MEMBERS = 200
"""Candidates that are members; there are as many others."""

FALSE_POSITIVES = 0.01
"""The share of others that may be taken for members, where the share of members that are found is counted."""

GUESSED = 0.2
"""The share of the pairs, the surest, of which the bound on epsilon guesses the member."""

WORDS: dict[View, str] = {
    "client's update": "a client's update",
    "state difference": "two global states, as any client sees them,",
    "sum of clients": "the sum of the clients' changes",
}
"""What a view is, in a sentence."""

FIRST_PAIRS, LEAST_PAIRS = 5, 20
"""Pairs by which the time of all is estimated, and the least that are worth it."""


@dataclass(frozen=True)
class Pair:
    """A member of a client's data, and a text of nobody in the round with the same label."""

    client: str
    member: Example
    other: Example


class Candidates:
    """Scores a candidate text by the cosine of a change with minus the gradient of the text's loss, in the
    state that the round began with: the mean of the cosines of all tensors, since the longest gradient, often
    the head's, would else be all that counts. Half of the candidates were trained on in the round; each of
    these has another of the same label, of a client that was not in the round, so that labels alone say
    nothing.

    A text that a client trained on pulls its change along minus its own gradient. The cosine of gradients is
    the measure of Geiping et al. 2020 (*Inverting Gradients*, arXiv 2003.14053), here of given texts.
    """

    name = "candidates"
    views: tuple[View, ...] = ("client's update", "state difference", "sum of clients")
    kinds: tuple[RoundKind, ...] = ("training",)
    source = "gradient matching (Geiping et al. 2020, arXiv 2003.14053), of given texts"

    def inapplicable(self, target: Target) -> str | None:
        """Where no changes of trained tensors are sent, or gradients have another form than these."""
        return target.no_gradients

    def attack(self, target: Target, seen: RoundView, deadline: Deadline) -> list[Finding | NotRun]:
        """AUC and true positives at 1 % false positives, by a client's update, by the state difference, and
        by the sum of the clients' changes where it says something else.
        """
        knowledge = target.knowledge
        updates = {m.client: m for m in seen.received}
        changes = {
            name: knowledge.comparable(knowledge.change(m.task, m.update)) for name, m in updates.items()
        }
        changes = {name: change for name, change in changes.items() if change}
        common = seen.task(target)
        like = next(iter(changes.values()), None) or knowledge.comparable(knowledge.wanted(common))
        difference, total = state_difference(seen, like), summed_change(target, seen)
        inside = list(changes) if seen.received else list(seen.answered)
        pairs = matched_pairs(target, inside, seen.answered)
        if not (changes or difference or total):
            raise CannotAttack("no client of the round sent what a gradient can be compared with")
        if not pairs:
            raise CannotAttack(
                "no text of a client in the round has another of its label, of a client that was not in it"
            )
        scores = np.zeros((3, 2, len(pairs)))  # view, member or other, pair
        entered: Tensor | None = None
        wanted, began = len(pairs), time.monotonic()
        for place, pair in enumerate(pairs):
            deadline.check()
            if place == FIRST_PAIRS:
                wanted = place + deadline.fitting((time.monotonic() - began) / place, wanted - place)
                if wanted < min(LEAST_PAIRS, len(pairs)):
                    raise OutOfTime
            if place == wanted:
                break
            change = changes.get(pair.client, {})
            task = updates[pair.client].task if changes else common
            first = next(iter(task.tensors.values()))
            if entered is not first:
                knowledge.enter(task)
                entered = first
            for side, example in enumerate((pair.member, pair.other)):
                gradient = knowledge.gradient(example, list(change or like))
                gradient = {name: tensor.cpu() for name, tensor in gradient.items()}
                scores[0, side, place] = likeness(change, gradient)
                scores[1, side, place] = likeness(difference, knowledge.in_state(gradient, task))
                scores[2, side, place] = likeness(total, gradient)
        scores = scores[:, :, :wanted]
        more = (
            f" ({len(pairs) - wanted} of {len(pairs)} pairs left out for time)" if wanted < len(pairs) else ""
        )
        found: list[Finding | NotRun] = []
        for view, known, of in zip(self.views, (changes, difference, total), scores, strict=True):
            if known:
                found += _findings(target, seen, view, of, more)
        if target.sums_only:
            found.append(NotRun(self.name, f"a client's update: {UNSEEN}", seen.number))
        return found


def matched_pairs(target: Target, clients: Sequence[str], answered: Sequence[str]) -> list[Pair]:
    """Texts of these clients, in turn, each with one of the same label that nobody in the round has. A text
    without such a partner is left out.
    """
    generator = np.random.default_rng([target.seed, 30])
    inside = {e for name in answered for e in _texts(target, name)}
    outside = [
        example
        for name in target.data.clients
        if name not in set(answered)
        for example in target.data.clients[name].train
        if example.text not in inside
    ]
    waiting: dict[int, list[Example]] = {}
    for position in generator.permutation(len(outside)):
        example = outside[int(position)]
        waiting.setdefault(example.label, []).append(example)
    turns = [list(generator.permutation(len(target.data.clients[name].train))) for name in clients]
    pairs: list[Pair] = []
    for turn in range(max(map(len, turns), default=0)):
        for name, order in zip(clients, turns, strict=True):
            if turn >= len(order) or len(pairs) == MOST_MEMBERS:
                continue
            member = target.data.clients[name].train[int(order[turn])]
            if waiting.get(member.label):
                pairs.append(Pair(name, member, waiting[member.label].pop()))
    return pairs


def _texts(target: Target, client: str) -> list[str]:
    return [example.text for example in target.data.clients[client].train]


def likeness(change: Tensors, gradient: Tensors) -> float:
    """The mean over tensors of the cosine of a change with minus a gradient; one that is zero counts as 0."""
    found = []
    for name in sorted(change.keys() & gradient.keys()):
        moved, pull = change[name].double(), gradient[name].double()
        size = float(moved.norm() * pull.norm())
        found.append(-float((moved * pull).sum()) / size if size else 0.0)
    return sum(found) / len(found) if found else 0.0


def _findings(
    target: Target, seen: RoundView, view: View, scores: np.ndarray, more: str = ""
) -> list[Finding]:
    members, others = scores
    count, many = len(members), len(members) + len(others)
    area, seed = auc(members, others), target.seed
    low, high = bootstrap(auc, members, others, seed)
    of = WORDS[view]
    if view == "sum of clients" and not target.sums_only:
        of += ", which secure sums would leave the server,"
    verdict = "does not tell" if low <= 0.5 <= high else f"tells with AUC {area:.3f}"
    said = f"{of} {verdict} whether a text with a known label was trained on in the round{more}"
    if seen.unseen:
        said += f" ({seen.unseen} clients left out: their updates are too large to keep)"

    def at_one_percent(a: np.ndarray, b: np.ndarray) -> float:
        return true_positives(a, b, FALSE_POSITIVES)

    share = at_one_percent(members, others)
    least, most = bootstrap(at_one_percent, members, others, seed)
    shown: View = "sum of clients" if target.sums_only else "client's update"
    promised: View = shown if target.recipe.example_privacy else "state difference"
    epsilon = _epsilon(target, seen, scores) if view == promised else None
    return [
        Finding(
            "candidates", view, seen.number, "AUC", area, 0.5, many, many, said, low, high, epsilon
        ),
        Finding(
            "candidates", view, seen.number, "TPR at 1 % FPR", share, FALSE_POSITIVES, many, many,
            f"{share:.0%} of {count} members are found while 1 % of the others are taken for members",
            least, most,
        ),
    ]  # fmt: skip


def _epsilon(target: Target, seen: RoundView, scores: np.ndarray) -> float | None:
    """The lower bound on epsilon; None unless clients' rows were drawn at random, and in all rounds but the
    first. Then it is a fair coin which text of a pair was there, and the client of the other one has had no
    part in anything yet.
    """
    if target.recipe.clients.partition != "iid" or seen.number != 1:
        return None
    differences = scores[0] - scores[1]
    number = max(1, int(GUESSED * len(differences)))
    surest = np.argsort(-np.abs(differences), kind="stable")[:number]
    correct = int((differences[surest] > 0).sum())
    return epsilon_bound(correct, number, len(differences), target.delta, swapped=True)
