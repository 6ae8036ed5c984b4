"""A check that gradients are the same with gradient checkpointing as without."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ...core.errors import ModelError
from ...core.library_errors import in_one_line
from ...core.memory_errors import out_of_memory
from ...data.tokens import TokenizedExample
from ...models.checkpointing import checkpointed_layers, checkpointing
from ...models.first_token import carry_classifying
from ...models.load import Base
from ...models.padding import FAILURES
from .objective import Objective
from .technique import TrainableModel

TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}
"""Relative difference of gradients that rounding explains."""


@torch.enable_grad()
def check_checkpointing(
    trainable: TrainableModel, objective: Objective, base: Base, rows: Sequence[TokenizedExample]
) -> None:
    """Compare the gradients of some rows with and without recomputed layers.

    Raises:
        ModelError: the model's code has no layers that can be recomputed, fails with them, or gives other
            gradients; or the model is compiled.
    """
    model, name = trainable.model, base.name
    said = f"training.gradient_checkpointing = true does not fit {name}: "
    if base.compile:
        raise ModelError(
            f"{said}with model.compile = true the compiler decides what is kept; use one of them"
        )
    if not checkpointed_layers(model):
        raise ModelError(
            f"{said}its {base.model.config.model_type} code has no layers that can be computed again; leave "
            "it off"
        )
    model.eval()

    def gradients(context: AbstractContextManager[None]) -> list[Tensor | None]:
        with context:
            loss = objective.loss(model, objective.collate(rows))
            return list(torch.autograd.grad(loss, list(trainable.parameters.values()), allow_unused=True))

    with torch.random.fork_rng(devices=[]):
        try:
            wanted, found = gradients(nullcontext()), gradients(checkpointing(model, [carry_classifying]))
        except FAILURES as error:
            if out_of_memory(error):
                raise
            raise ModelError(f"{said}its code fails ({in_one_line(error)[:200]}); leave it off") from error
    gap = size = 0.0
    for parameter, one, other in zip(trainable.parameters.values(), wanted, found, strict=True):
        expected, repeated = (torch.zeros_like(parameter) if g is None else g for g in (one, other))
        gap += _square(repeated - expected)
        size += _square(expected)
    if not math.sqrt(gap) <= TOLERANCE[base.precision] * math.sqrt(size):
        relative = math.sqrt(gap / size) if size else math.inf
        raise ModelError(f"{said}gradients differ by {relative:.1%} from those without; leave it off")


def _square(tensor: Tensor) -> float:
    return float(tensor.float().square().sum())
