"""Tokens of a client by public texts whose gradients resemble its change."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..core.tensors import Tensors
from ..data.examples import Example
from .attack import CannotAttack, Deadline, OutOfTime, RoundView, Target
from .changes import OneChange
from .results import Finding, View
from .statistics import share_interval

MOST_TEXTS, LEAST_TEXTS, FIRST_TEXTS = 500, 50, 5
"""Auxiliary texts at most and at least, and those by which the time of all is estimated."""

SHARPNESS = 3.0
"""By how much a text counts more whose likeness is one standard deviation higher, as a logarithm."""

DRAWS = 20
"""Sets of auxiliary texts by which the size of a client's vocabulary is estimated."""


@dataclass(frozen=True)
class AuxiliaryTexts:
    """Texts of the development and test splits that no client of the round trained on, with their tokens,
    special ones left out.

    Attributes:
        examples: The texts.
        tokens: Which tokens each has, (texts, tokens); ``vocabulary`` are their numbers, (tokens,).
        labels: Their labels, (texts,).
    """

    examples: list[Example]
    tokens: np.ndarray
    vocabulary: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(cls, target: Target, clients: Sequence[str]) -> AuxiliaryTexts:
        """Drawn by the recipe's seed.

        Raises:
            CannotAttack: there are too few.
        """
        own = {e.text for name in clients for e in target.data.clients[name].train}
        held = {e.text: e for e in [*target.data.development, *target.data.test] if e.text not in own}
        examples = list(held.values())
        if len(examples) < LEAST_TEXTS:
            raise CannotAttack(
                f"{len(examples)} texts of the development and test splits are not the clients': at least "
                f"{LEAST_TEXTS} are needed whose gradients a change is compared with"
            )
        order = np.random.default_rng([target.seed, 37]).permutation(len(examples))[:MOST_TEXTS]
        return cls._tokenised(target, [examples[place] for place in order])

    @classmethod
    def _tokenised(cls, target: Target, examples: list[Example]) -> AuxiliaryTexts:
        sets = [words(target, example) for example in examples]
        vocabulary = np.array(sorted(frozenset[int]().union(*sets)))
        tokens = np.zeros((len(examples), len(vocabulary)))
        for row, present in enumerate(sets):
            tokens[row, np.searchsorted(vocabulary, sorted(present))] = 1
        return cls(examples, tokens, vocabulary, np.array([example.label for example in examples]))

    def first(self, count: int) -> AuxiliaryTexts:
        """As many of them."""
        return AuxiliaryTexts(
            self.examples[:count], self.tokens[:count], self.vocabulary, self.labels[:count]
        )

    def size(self, texts: int, seed: int) -> int:
        """How many different tokens so many texts have, by those that are here."""
        draw, many = np.random.default_rng([seed, 38]), len(self.examples)
        drawn = [draw.choice(many, min(texts, many), replace=False) for _ in range(DRAWS)]
        return round(float(np.mean([self.tokens[each].any(axis=0).sum() for each in drawn])))

    def shares(self, labels: Sequence[int]) -> np.ndarray:
        """Weights of the texts by which their labels have the shares of these labels, (texts,)."""
        weights = np.zeros(len(self.examples))
        for label in set(labels):
            there = self.labels == label
            if there.any():
                weights[there] = labels.count(label) / there.sum()
        total = weights.sum()
        return weights / total if total else np.full(len(weights), 1 / len(weights))

    def guess(self, weights: np.ndarray, count: int) -> frozenset[int]:
        """The tokens that texts of such weights, (texts,), have most."""
        order = np.argsort(-(weights @ self.tokens), kind="stable")[:count]
        return frozenset(self.vocabulary[order].tolist())


def words(target: Target, example: Example) -> frozenset[int]:
    """The tokens of an example, without special ones, which all have."""
    special = target.knowledge.parts.base.tokenizer.all_special_ids
    return target.knowledge.tokens(example) - frozenset(special)


def auxiliary_findings(
    target: Target, seen: RoundView, changes: Sequence[OneChange], deadline: Deadline
) -> list[Finding]:
    """How well the tokens of clients are guessed from public texts whose gradients resemble the changes.

    The likeness of a client's change and a public text is that of ``candidates``: the mean cosine over
    tensors. The client's labels are taken to be known. Among texts of a label, one counts ``exp(3 z)`` where
    z is its likeness in standard deviations; the tokens that such texts have most are guessed, as many as so
    many public texts have on average. Without the likeness these are the most frequent tokens of the labels,
    which is chance here.

    Raises:
        CannotAttack: there are too few public texts, or no change that a gradient can be compared with.
        OutOfTime: there is no time for enough of them.
    """
    knowledge = target.knowledge
    compared = [(each, knowledge.comparable(each.change)) for each in changes]
    compared = [(each, change) for each, change in compared if change]
    if not compared:
        raise CannotAttack("no client of the round sent what a gradient can be compared with")
    texts = AuxiliaryTexts.of(target, [each.client for each, _ in compared])
    knowledge.enter(compared[0][0].task)
    names = sorted(frozenset[str]().union(*(change for _, change in compared)))
    rows: list[list[float]] = []
    began = time.monotonic()
    wanted = len(texts.examples)
    for place, example in enumerate(texts.examples):
        deadline.check()
        if place == FIRST_TEXTS:
            wanted = place + deadline.fitting((time.monotonic() - began) / place, wanted - place)
            if wanted < LEAST_TEXTS:
                raise OutOfTime
        if place == wanted:
            break
        gradient = {name: tensor.cpu() for name, tensor in knowledge.gradient(example, names).items()}
        rows.append(likenesses([change for _, change in compared], gradient))
    texts, likeness = texts.first(wanted), np.array(rows).T
    found: list[Finding] = []
    for view in dict.fromkeys(each.view for each, _ in compared):
        places = [place for place, (each, _) in enumerate(compared) if each.view == view]
        clients = [compared[place][0].client for place in places]
        found.append(_finding(target, seen, view, clients, texts, likeness[places]))
    return found


def likenesses(changes: Sequence[Tensors], gradient: Mapping[str, Tensor]) -> list[float]:
    """Of each change the mean over tensors of its cosine with minus a gradient."""
    found = []
    pulls = {name: tensor.flatten() for name, tensor in gradient.items()}
    sizes = {name: float(tensor.norm()) for name, tensor in pulls.items()}
    for change in changes:
        cosines = []
        for name in change.keys() & pulls.keys():
            moved = change[name].flatten()
            size = float(moved.norm()) * sizes[name]
            cosines.append(-float(moved @ pulls[name]) / size if size else 0.0)
        found.append(sum(cosines) / len(cosines) if cosines else 0.0)
    return found


def weights_by_likeness(texts: AuxiliaryTexts, labels: Sequence[int], likeness: np.ndarray) -> np.ndarray:
    """The weights of texts, (texts,): their labels' shares, and among those of one label by likeness."""
    spread = float(likeness.std())
    scores = np.zeros(len(likeness))
    for label in np.unique(texts.labels):
        there = texts.labels == label
        if spread:
            scores[there] = (likeness[there] - likeness[there].mean()) / spread
    weights: np.ndarray = texts.shares(labels) * np.exp(SHARPNESS * (scores - scores.max()))
    return weights


def _finding(
    target: Target,
    seen: RoundView,
    view: View,
    clients: Sequence[str],
    texts: AuxiliaryTexts,
    likeness: np.ndarray,
) -> Finding:
    attacked, guessed = [], []
    for client, scores in zip(clients, likeness, strict=True):
        train = target.data.clients[client].train
        right = frozenset[int]().union(*(words(target, example) for example in train))
        labels = [example.label for example in train]
        count = texts.size(len(train), target.seed)
        attacked.append(f1(texts.guess(weights_by_likeness(texts, labels, scores), count), right))
        guessed.append(f1(texts.guess(texts.shares(labels), count), right))
    values, chance = np.array(attacked), float(np.mean(guessed))
    low, high = share_interval(values, target.seed)
    least, most = share_interval(values - np.array(guessed), target.seed)
    more = f" ({seen.unseen} clients left out: their updates are too large to keep)" if seen.unseen else ""
    return Finding(
        "inversion", view, seen.number, "token F1, by auxiliary texts", float(values.mean()), chance,
        len(clients), len(texts.vocabulary),
        f"tokens of {len(texts.examples)} public texts whose gradients resemble the change; against the most "
        f"frequent tokens of the client's labels {float(values.mean()) - chance:+.3f} ({least:+.3f} to "
        f"{most:+.3f}){more}",
        low, high,
    )  # fmt: skip


def f1(guess: frozenset[int], right: frozenset[int]) -> float:
    """The harmonic mean of precision and recall of a set."""
    return 2 * len(guess & right) / max(1, len(guess) + len(right))
