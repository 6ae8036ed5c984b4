"""A check that clients who share a batch get the losses and gradients that each would get alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ....core.library_errors import in_one_line
from ....core.memory_errors import out_of_memory
from ....core.tensors import Tensors
from ....data.tokens import TokenizedExample
from ....models.padding import FAILURES
from ..objective import Objective
from ..technique import TrainableModel
from .client_modules import ClientModules

LOSSES, GRADIENTS = 5e-3, 2e-2
"""Relative differences that rounding explains, in float32."""

COARSE = 10.0
"""By how much more numbers differ in bfloat16."""


@torch.enable_grad()
def disagreement(
    modules: ClientModules,
    trainable: TrainableModel,
    objective: Objective,
    rows: Sequence[TokenizedExample],
    *,
    coarse: bool,
    equal: bool,
) -> str | None:
    """How the losses and gradients of two unlike clients in one batch differ from those of each alone; None
    where they agree. The first client has the first of the ``rows``, the second the others; both have other
    tensors. ``coarse``: passes compute in bfloat16; ``equal``: rows of one batch are of one length.

    A stand-in takes the rows to be the first dimension of what its layer is given. Layers of models that
    flatten or permute it (XLNet, Longformer, mixtures of experts) fail, or silently take other numbers.
    """
    model, parameters = trainable.model, trainable.parameters
    first, second = list(rows[:1]), [rows[0]] * 2 if equal else list(rows[1:])
    kept = {name: p.detach().clone() for name, p in parameters.items()}
    tensors = [_perturbed(kept, seed) for seed in (1, 2)]
    model.eval()
    try:
        alone = []
        for own, some in zip(tensors, (first, second), strict=True):
            _put(parameters, own)
            losses = objective.row_losses(model, objective.collate(some))
            gradients = torch.autograd.grad(losses.sum(), list(parameters.values()), allow_unused=True)
            alone.append((losses.detach(), dict(zip(parameters, gradients, strict=True))))
        _put(parameters, kept)
        stacks = {n: torch.stack([own[n] for own in tensors]).requires_grad_() for n in parameters}
        owners = torch.tensor([0] * len(first) + [1] * len(second), device=losses.device)
        modules.give(stacks, owners)
        try:
            with modules.in_place():
                shared = objective.row_losses(model, objective.collate([*first, *second]))
            found = torch.autograd.grad(shared.sum(), list(stacks.values()), allow_unused=True)
        except (*FAILURES, MemoryError) as error:
            if out_of_memory(error):
                return None  # training makes smaller batches then
            return in_one_line(error)[:120]
    finally:
        _put(parameters, kept)
    return _difference(alone, shared.detach(), dict(zip(stacks, found, strict=True)), COARSE if coarse else 1)


def _difference(
    alone: Sequence[tuple[Tensor, Mapping[str, Tensor | None]]],
    shared: Tensor,
    found: Mapping[str, Tensor | None],
    tolerance: float,
) -> str | None:
    expected = torch.cat([losses for losses, _ in alone])
    scale = expected.abs().clamp(min=1e-3)
    gap = ((shared - expected).abs() / scale).max().item()
    if not gap <= LOSSES * tolerance:
        worst = int(((shared - expected).abs() / scale).argmax())
        return f"a loss of {shared[worst]:.3g} in place of {expected[worst]:.3g}"
    for client, (_, gradients) in enumerate(alone):
        whole = sum(float(g.float().norm() ** 2) for g in gradients.values() if g is not None) ** 0.5
        for name, right in gradients.items():
            stack = found[name]
            ours = None if stack is None else stack[client].float()
            size = 0.0 if right is None else float(right.float().norm())
            other = torch.zeros(()) if right is None else right.float()
            off = float((other - (0.0 if ours is None else ours)).norm())
            if not off <= GRADIENTS * tolerance * max(size, 1e-2 * whole):
                return f"a gradient of {name} that differs by {off / max(size, 1e-12):.0%}"
    return None


def _perturbed(tensors: Mapping[str, Tensor], seed: int) -> Tensors:
    """Other values of a like size, so that none has a gradient of zero by its initialisation."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, tensor in tensors.items():
        size = max(0.02, 0.3 * float(tensor.float().square().mean().sqrt()))
        result[name] = tensor + size * torch.randn(tensor.shape, generator=generator).to(tensor)
    return result


def _put(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
