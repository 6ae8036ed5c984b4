"""What texts usually have: tokens and their positions, by a thousand texts of the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from .attack import Target

MOST_TEXTS = 1000
"""Texts that are counted."""

DRAWS = 20
"""Sets of texts by which numbers are estimated."""

T = TypeVar("T", int, tuple[int, int])

Pair = tuple[int, int]
"""A token and its position; position 0 stands for all where the model's inputs do not tell them apart."""


@dataclass(frozen=True)
class Usual:
    """Pairs and tokens of texts, the most frequent first; ``sets`` are the pairs of each text. Special tokens
    are left out of ``tokens``.
    """

    pairs: list[Pair]
    tokens: list[int]
    sets: list[frozenset[Pair]]
    special: frozenset[int]
    seed: int

    @classmethod
    def of(cls, target: Target, *, positions: bool) -> Usual:
        """Of texts that are drawn by the recipe's seed."""
        knowledge = target.knowledge
        order = np.random.default_rng([target.seed, 36]).permutation(len(target.texts))[:MOST_TEXTS]
        sets = [pairs_of(knowledge.texts(target.texts[int(place)]), positions=positions) for place in order]
        special = frozenset(knowledge.parts.base.tokenizer.all_special_ids)
        pairs = Counter(pair for each in sets for pair in each)
        tokens = Counter(token for each in sets for token in {t for t, _ in each} - special)
        return cls(ranked(pairs), ranked(tokens), sets, special, target.seed)

    def numbers(self, texts: int) -> tuple[int, int]:
        """How many different pairs and different tokens so many texts have on average."""
        draw = np.random.default_rng([self.seed, 38])
        pairs, tokens = [], []
        for _ in range(DRAWS):
            chosen = draw.choice(len(self.sets), min(texts, len(self.sets)), replace=False)
            every = frozenset[Pair]().union(*(self.sets[int(place)] for place in chosen))
            pairs.append(len(every))
            tokens.append(len({token for token, _ in every} - self.special))
        return round(float(np.mean(pairs))), round(float(np.mean(tokens)))


def ranked(counts: Counter[T]) -> list[T]:
    """What is counted, the most frequent first."""
    return sorted(counts, key=lambda each: (-counts[each], each))


def pairs_of(texts: Collection[list[int]], *, positions: bool) -> frozenset[Pair]:
    """Tokens with their positions."""
    return frozenset((token, place if positions else 0) for text in texts for place, token in enumerate(text))
