"""A check that passing lower layers by gives what computing them gives."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...data.tokens import TokenizedExample
from ...models.frozen_layers import LowerLayers
from ...models.padding import FAILURES
from .objective import Objective
from .technique import TrainableModel

TOLERANCE = 1e-4
"""Relative difference of a loss that rounding explains in float32; a hundred times as much in bfloat16."""


@torch.no_grad()
def passes_by(
    lower: LowerLayers,
    trainable: TrainableModel,
    objective: Objective,
    rows: Sequence[TokenizedExample],
    *,
    coarse: bool,
    equal: bool,
) -> bool:
    """Whether rows have the same losses with their lower layers passed by; nothing is kept of them.

    Code that takes more from a lower layer than its states fails, or gives others: T5's first layer computes
    the biases by position of all, for one. ``coarse``: passes compute in bfloat16; ``equal``: rows of one
    batch are of one length.
    """
    model, some = trainable.model, [rows[0]] * 2 if equal else list(rows)
    model.eval()
    batch = objective.collate(some)
    try:
        lower.forget()
        expected = objective.row_losses(model, batch).float()
        for _ in range(2):
            lower.expect(some, batch["attention_mask"])
            found = objective.row_losses(model, batch).float()
        passed = lower.passed > 0
    except torch.OutOfMemoryError:
        return False
    except FAILURES:
        return False
    finally:
        lower.empty()
    gap = ((found - expected).abs() / expected.abs().clamp(min=1e-3)).max().item()
    return passed and gap <= TOLERANCE * (100 if coarse else 1)
