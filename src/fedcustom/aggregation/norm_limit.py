"""Norm limit: refuses a change far larger than those of other clients, which would ruin the global state."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FEWEST_TO_COMPARE = 3
"""Changes from which on one is compared with the others: of two, either may be the malicious one."""

MAX_NORM = 1e6
"""Largest norm of a change by default, whatever the others'."""

MAX_RATIO = 100.0
"""How many times the median of other changes one may be by default."""


@dataclass(frozen=True)
class ChangeSize:
    """The Euclidean norm of a client's change, over all its tensors, and its optimiser steps."""

    norm: float
    steps: int = 1


@dataclass(frozen=True)
class Median:
    """Medians of changes' norms, as they are and divided by their steps."""

    norm: float = 0.0
    a_step: float = 0.0

    @classmethod
    def of(cls, sizes: Sequence[ChangeSize]) -> Median:
        """Those of some changes; zero of none."""
        if not sizes:
            return cls()
        return cls(
            statistics.median(size.norm for size in sizes),
            statistics.median(size.norm / size.steps for size in sizes),
        )

    def largest(self, other: Median) -> Median:
        """The larger of each."""
        return Median(max(self.norm, other.norm), max(self.a_step, other.a_step))


def change_size(tensors: Mapping[str, Tensor], steps: int = 1) -> ChangeSize:
    """The size of a change; its norm is taken in float64, so that no finite change overflows."""
    squares = 0.0
    for tensor in tensors.values():
        if tensor.is_floating_point() and tensor.numel():
            squares += float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
    return ChangeSize(math.sqrt(squares), max(1, steps))


def too_large(
    size: ChangeSize,
    others: Sequence[ChangeSize],
    state: Mapping[str, Tensor] | None = None,
    *,
    max_norm: float = MAX_NORM,
    max_ratio: float = MAX_RATIO,
    least: Median = Median(),
) -> str | None:
    """Why a change is refused; None if it is not.

    It is where its norm is above ``max_norm``; or above ``max_ratio`` times the median of ``others`` both as
    it is and divided by its steps: clients with much data make longer changes than others, those with little
    longer ones a step. Fewer than three others, or others that did not move, are not compared with; then it
    is refused above ``max_ratio`` times the norm of the ``state`` that it changes, if that has one. (A state
    that began as zeros, or that the server follows in small steps, may be far smaller than every sound
    change.) ``least`` is what the medians are taken to be at least.
    """
    shown = f"its change has norm {size.norm:.3g}"
    if not size.norm <= max_norm:
        return f"{shown}; at most {max_norm:.3g} is allowed (aggregation.max_norm)"
    medians = Median.of(others)
    if len(others) < FEWEST_TO_COMPARE or not medians.norm > 0:
        state_norm = change_size(state or {}).norm
        if 0 < max_ratio * state_norm < size.norm:
            return (
                f"{shown}, more than {max_ratio:g} times that of the state ({state_norm:.3g}; "
                "aggregation.max_norm_ratio)"
            )
        return None
    medians = medians.largest(least)
    if size.norm > max_ratio * medians.norm and size.norm / size.steps > max_ratio * medians.a_step:
        return (
            f"{shown}, more than {max_ratio:g} times the median of other clients' ({medians.norm:.3g}; "
            "aggregation.max_norm_ratio)"
        )
    return None
