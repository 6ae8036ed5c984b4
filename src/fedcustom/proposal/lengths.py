"""Lengths of inputs and targets in tokens, from a sample of the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..data.encode import Cut, encode_examples, encode_targets
from ..data.examples import Example
from ..data.settings import DataSettings
from ..models.load import Base

SAMPLED = 1000
"""Rows whose tokens are counted at most."""

UNCUT = 1_000_000
"""Tokens beyond which no text of a sample is looked at: the largest ``data.max_length``."""

SHARE = 0.98
"""Part of the sampled texts that a proposed length holds whole."""

STEP = 8

LEAST, LEAST_TARGET, LEAST_CHAT = 32, 32, 256
"""Tokens at least: new inputs may be longer than those of the sample, and a length that no text has costs
nothing. Conversations grow with every turn."""

LONGEST_INPUT, LONGEST_TARGET = 512, 256
"""Tokens at most that are proposed: a processor takes long for more."""


@dataclass(frozen=True)
class Lengths:
    """Proposed lengths: ``longest`` and ``longest_target`` are those of the sample, ``target`` is None where
    nothing is written.
    """

    input: int
    longest: int
    sampled: int
    target: int | None = None
    longest_target: int = 0


def measure_lengths(
    base: Base, examples: Sequence[Example], data: DataSettings, positions: int | None
) -> Lengths:
    """Lengths that hold nearly all of a sample.

    Args:
        positions: the model's context in tokens, without what the method takes of it; None: no bound.

    Raises:
        DataError, ModelError: see :func:`~fedcustom.data.encode.encode`.
    """
    some = evenly(examples, SAMPLED)
    targets = list[int]()
    if base.chat is not None:
        whole = data.model_copy(update={"max_length": UNCUT, "max_target_length": UNCUT})
        encoded = list(base.chat.encode(some, whole, base.token_rules))
        given, targets = [len(one.prompt) for one in encoded], [len(one.answer) for one in encoded]
    else:
        cut = Cut(UNCUT)
        given = [len(one.ids) for one in encode_examples(base.tokenizer, some, cut, base.token_rules)]
        if data.task != "classification":
            texts = [example.target for example in some]
            texts += [example.rejected for example in some if example.rejected]
            found = encode_targets(base.tokenizer, texts, UNCUT, base.token_rules)
            targets = [len(one.ids) for one in found]
    target = _holding(targets, LEAST_TARGET, LONGEST_TARGET) if targets else None
    most = LONGEST_INPUT
    if positions is not None:
        half = positions // 2
        target = min(target, half) if target is not None and data.writes else target
        most = min(most, positions - (target or 0) if data.writes else positions)
    least = LEAST_CHAT if base.chat is not None else LEAST
    return Lengths(_holding(given, least, most), max(given), len(some), target, max(targets, default=0))


def evenly(examples: Sequence[Example], count: int) -> list[Example]:
    """So many of the examples, at even distances."""
    places = np.linspace(0, len(examples) - 1, min(count, len(examples))).round().astype(int)
    return [examples[int(place)] for place in places]


def _holding(lengths: Sequence[int], least: int, most: int) -> int:
    """A length that holds nearly all of some texts: all, where the longest is not much longer."""
    ordered = sorted(lengths)
    share = ordered[min(len(ordered) - 1, int(SHARE * len(ordered)))]
    wanted = ordered[-1] if ordered[-1] <= 1.25 * share else share
    return min(most, max(least, -(-wanted // STEP) * STEP))
