"""Texts from the tokens of each position: combinations whose inputs of the second layer are in its span."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from itertools import product

import torch
from torch import Tensor

from .attack import Deadline
from .layer_inputs import LayerInputs

MOST_COMBINATIONS = 4096
"""Texts of one length, or beginnings of texts, that are tried."""

Text = tuple[int, ...]
Holds = Callable[[Tensor], Tensor]
"""Which vectors, (vectors, width), are in a span, (vectors,)."""


def is_causal(second: LayerInputs) -> bool:
    """Whether a position's input of the second layer does not depend on what follows."""
    first, other = second.of_texts([[1, 2], [1, 3]])[:, 0]
    return torch.allclose(first, other, rtol=1e-5, atol=1e-6)


def grown(second: LayerInputs, holds: Holds, at: Sequence[Collection[int]], deadline: Deadline) -> set[Text]:
    """The texts of a causal model, from left to right: a beginning is extended by each token of the next
    position, and what is not in the span of the second layer is dropped. A text that no token extends is
    whole.

    Where there are too many beginnings, nothing is found. This is the greedy search of DAGER (Petrov et al.
    2024, arXiv 2405.15586, section 4.2) for decoders.

    Args:
        at: The tokens that each position may have.
    """
    found, beginnings = set[Text](), [Text()]
    for tokens in at:
        deadline.check()
        longer = [(*text, token) for text in beginnings for token in sorted(tokens)]
        if len(longer) > MOST_COMBINATIONS:
            return found
        fits = holds(second.of_texts(longer)[:, -1]).tolist() if longer else []
        kept = [text for text, is_in in zip(longer, fits, strict=True) if is_in]
        found |= set(beginnings) - {text[:-1] for text in kept} - {()}
        beginnings = kept
        if not beginnings:
            return found
    return found | set(beginnings)


def combined(
    second: LayerInputs | None,
    holds: Holds | None,
    at: Sequence[Collection[int]],
    special: Collection[int],
    deadline: Deadline,
) -> set[Text]:
    """The texts of a model that sees all of a text: for each position that may be the last, the combinations
    of tokens up to it. Where there are ``special`` tokens after the first position, texts end with one, and
    have them at both ends only.

    Where the second layer has a span, all positions of a text have to be in it. Without one, only lengths of
    which there is a single combination are taken. Without special tokens, the beginning of another text is no
    text.
    """
    ended = any(token in special for tokens in at[1:] for token in tokens)
    found = set[Text]()
    for last in range(1, len(at)):
        inner = [[t for t in tokens if not ended or t not in special] for tokens in at[1:last]]
        ends = [t for t in at[last] if not ended or t in special]
        choices = [sorted(at[0]), *inner, ends]
        number = math.prod(len(each) for each in choices)
        if not 0 < number <= MOST_COMBINATIONS:
            continue
        deadline.check()
        texts = list(product(*choices))
        if second is not None and holds is not None:
            states = second.of_texts(texts)
            fits = holds(states.flatten(0, 1)).reshape(len(texts), -1).all(dim=1).tolist()
            found |= {text for text, is_in in zip(texts, fits, strict=True) if is_in}
        elif number == 1:
            found |= set(texts)
    if ended:
        return found
    return {text for text in found if not any(other[: len(text)] == text != other for other in found)}
