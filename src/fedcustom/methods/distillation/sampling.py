"""Sampling of the public texts of a round."""

from __future__ import annotations

import numpy as np

from .messages import DistilTask
from .packing import Integers, unpack_positions

ASKED = "asked"
"""The name under which a task holds the texts that the client is to answer for, one bit each."""


def drawn(samples: int | None, count: int, seed: int, round_number: int) -> Integers:
    """The positions of a round's public texts, in rising order: a pure function of (seed, round)."""
    if samples is None or samples >= count:
        return np.arange(count)
    order = np.random.default_rng([seed, 12, round_number]).permutation(count)
    chosen: Integers = np.sort(order[:samples]).astype(np.int64)
    return chosen


def asked_in(task: DistilTask, count: int) -> Integers:
    """The texts that a task asks about, in rising order; none in a local run's."""
    return unpack_positions(task.tensors[ASKED], count) if ASKED in task.tensors else np.empty(0, np.int64)
