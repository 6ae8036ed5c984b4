"""Calibration: expected calibration error, reliability bins and temperature scaling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

BINS = 15
"""Bins of equal width in which confidence is compared with accuracy."""

SCALES = tuple(10 ** (step / 20 - 1) for step in range(41))
"""What logits are multiplied by when a temperature is looked for: 0.1 to 10 in steps of an eighth."""

Array = np.ndarray[Any, np.dtype[Any]]


def binned(confidence: Array, right: Array) -> list[list[float]]:
    """For each of :data:`BINS` bins of confidence (0 to 1; a bin leaves out its lower edge, but for 0): how
    many examples it has, the sum of their confidences, and how many of them were ``right``. These add up over
    clients.
    """
    place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    columns = [
        np.bincount(place, weights=w, minlength=BINS) for w in (np.ones(len(place)), confidence, right)
    ]
    return [[float(count), float(said), float(true)] for count, said, true in zip(*columns, strict=True)]


def softmax(logits: Array) -> Array:
    """Probabilities of logits, over the last axis."""
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares: Array = odds / odds.sum(axis=-1, keepdims=True)
    return shares


def reliability(logits: Array, labels: Sequence[int]) -> list[list[float]]:
    """:func:`binned` of logits (examples, labels); confidence is the highest probability."""
    right = logits.argmax(axis=1) == np.asarray(labels, dtype=int)
    return binned(softmax(logits).max(axis=1), right)


def expected_calibration_error(bins: Sequence[Sequence[float]]) -> float:
    """The mean over examples of |accuracy - mean confidence| of their bin (Guo et al. 2017, eq. 3), from
    :func:`binned` or the sum of several; NaN without examples.
    """
    total = sum(count for count, _, _ in bins)
    return sum(abs(right - said) for _, said, right in bins) / total if total else math.nan


def tempered_losses(logits: Array, labels: Sequence[int]) -> list[float]:
    """The sum of losses in nats of logits (examples, labels) times each of :data:`SCALES`; these add up over
    clients.
    """
    import torch  # here: a report's figures need none of it
    from torch.nn import functional

    scores, wanted = torch.from_numpy(logits).double(), torch.tensor(labels, dtype=torch.long)
    return [float(functional.cross_entropy(scale * scores, wanted, reduction="sum")) for scale in SCALES]


def best_scale(losses: Sequence[float]) -> float:
    """What logits are best multiplied by (1 / temperature; Guo et al. 2017, section 4.2): the least of the
    sums of :func:`tempered_losses`, between whose neighbours a parabola in log scale is laid.

    The log of the scale has a normal prior of mean 0 and deviation 1, which a few hundred examples outweigh:
    a handful of right answers is no reason for certainty.
    """
    losses = [loss + 0.5 * math.log(scale) ** 2 for loss, scale in zip(losses, SCALES, strict=True)]
    place = int(np.argmin(losses))
    if not 0 < place < len(SCALES) - 1:
        return SCALES[place]
    before, here, after = losses[place - 1 : place + 2]
    bend = before - 2 * here + after
    shift = 0.5 * (before - after) / bend if bend > 0 else 0.0
    step = math.log(SCALES[1] / SCALES[0])
    return math.exp(math.log(SCALES[place]) + shift * step)
