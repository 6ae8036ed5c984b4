"""Texts of tokens by position: the search finds the right ones, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedcustom.audit.rebuild import combined, grown
from helpers.audit import LATER


class Beginnings:
    """A second layer whose input is the number of the beginning of a text that ends there."""

    def __init__(self) -> None:
        self.numbers: dict[tuple[int, ...], int] = {}

    def number(self, text: Sequence[int]) -> int:
        return self.numbers.setdefault(tuple(text), len(self.numbers))

    def of_texts(self, texts: Sequence[Sequence[int]]) -> Tensor:
        rows = [[[self.number(text[: place + 1])] for place in range(len(text))] for text in texts]
        return torch.tensor(rows)


TEXTS = st.sets(st.lists(st.integers(0, 3), min_size=1, max_size=5).map(tuple), min_size=1, max_size=4)


@settings(deadline=None)
@given(TEXTS)
def test_texts_grow_from_left_to_right(texts: set[tuple[int, ...]]) -> None:
    """All that begin no other one."""
    second: Any = Beginnings()
    allowed = {second.number(text[:end]) for text in texts for end in range(1, len(text) + 1)}
    at = [{text[place] for text in texts if len(text) > place} for place in range(6)]

    def holds(vectors: Tensor) -> Tensor:
        return torch.tensor([int(vector) in allowed for vector in vectors])

    whole = {t for t in texts if not any(other[: len(t)] == t != other for other in texts)}
    assert grown(second, holds, at, LATER) == whole


def test_too_many_beginnings_give_nothing() -> None:
    at = [set(range(20))] * 4

    def holds(vectors: Tensor) -> Tensor:
        return torch.ones(len(vectors), dtype=torch.bool)

    second: Any = Beginnings()
    assert grown(second, holds, at, LATER) == set()
    found = combined(second, holds, at, set(), LATER)  # 400 of two tokens are tried, 8,000 of three are not
    assert {len(text) for text in found} == {2}
    assert len(found) == 400


def test_positions_that_resolve_a_text() -> None:
    special = {101, 102}
    assert combined(None, None, [{101}, {5}, {6}, {102}, set()], special, LATER) == {(101, 5, 6, 102)}
    assert combined(None, None, [{101}, {5, 7}, {6}, {102}], special, LATER) == set()
    assert combined(None, None, [{101}, {5}, {6, 102}, {102}], special, LATER) == {
        (101, 5, 102), (101, 5, 6, 102),
    }  # fmt: skip
    assert combined(None, None, [{1}, {2}, {3}, set()], special, LATER) == {(1, 2, 3)}
    assert combined(None, None, [set(), {2}], special, LATER) == set()


def test_the_second_layer_decides() -> None:
    """Which of the combinations is one text: all of its positions have to fit."""
    second: Any = Beginnings()
    texts = {(101, 5, 6, 102), (101, 7, 8, 102)}
    allowed = {second.number(text[:end]) for text in texts for end in range(1, 5)}

    def holds(vectors: Tensor) -> Tensor:
        return torch.tensor([int(vector) in allowed for vector in vectors])

    assert combined(second, holds, [{101}, {5, 7}, {6, 8}, {102}], {101, 102}, LATER) == texts
