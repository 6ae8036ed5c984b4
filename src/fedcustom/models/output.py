"""Output layer of a decoder, and target losses without the logits of all positions."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

LOGIT_BYTES = {"cpu": 2**24, "cuda": 2**30}
"""Logits that exist at one time: on a CPU what its cache holds."""

FEWEST_ROWS = 256
"""Products of fewer rows are slow, however large the vocabulary."""


class _Pass(threading.local):
    """The pass that a thread makes for states: for which layer, and what that was given."""

    layer: OutputLayer | None = None
    states: Tensor | None = None


_PASS = _Pass()


class OutputLayer:
    """The matrix that makes logits of a decoder's last hidden states.

    In a pass that :meth:`states` makes, the model gives no logits, but what it would make them of.
    """

    def __init__(self, matrix: nn.Linear) -> None:
        self.matrix = matrix
        matrix.register_forward_pre_hook(self._take)

    def _take(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor] | None:
        if _PASS.layer is not self:
            return None
        _PASS.states = arguments[0]
        return (arguments[0][:, :0],)

    def states(self, model: Any, **inputs: Tensor) -> Tensor:
        """What the matrix is given in a pass of the model, (rows, tokens, width).

        Raises:
            ValueError: the model did not use the matrix.
        """
        _PASS.layer, _PASS.states = self, None
        try:
            model(**inputs)
            found = _PASS.states
        finally:
            _PASS.layer, _PASS.states = None, None
        if found is None:
            raise ValueError("the model makes its logits in another way")
        return found

    def serves(self, model: Any) -> bool:
        """Whether the matrix is still what gives this model's logits, and nothing trains it now."""
        trains = self.matrix.weight.requires_grad and torch.is_grad_enabled()
        return model.get_output_embeddings() is self.matrix and not trains

    def losses(self, states: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats of each target, (targets,), from states of (targets, width)."""
        weight, device_type = self.matrix.weight.detach(), states.device.type
        if torch.is_autocast_enabled(device_type):
            states = states.to(torch.get_autocast_dtype(device_type))
        weight, device = weight.to(states.dtype), targets.device
        room = LOGIT_BYTES.get(device_type, LOGIT_BYTES["cpu"])
        chunk = max(FEWEST_ROWS, room // (4 * len(weight)))
        result: Tensor = _TargetLosses.apply(  # type: ignore[no-untyped-call]
            states, weight, targets.to(states.device), chunk
        )
        return result.to(device)  # the layer may lie on another one


class _TargetLosses(torch.autograd.Function):
    """Losses together with their gradients, a chunk of rows at a time."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        losses = torch.empty(len(states), dtype=torch.float32, device=states.device)
        gradients = torch.empty_like(states) if wanted else None
        for start in range(0, len(states), chunk):
            stop = start + chunk
            target = targets[start:stop, None]
            logits = functional.linear(states[start:stop], weight).float()
            logits -= logits.amax(dim=1, keepdim=True)
            chosen = logits.gather(1, target)
            sums = logits.exp_().sum(dim=1, keepdim=True)
            losses[start:stop] = (sums.log() - chosen)[:, 0]
            if gradients is not None:  # of logits: the softmax, less one at the target
                logits /= sums
                logits.scatter_add_(1, target, torch.full_like(chosen, -1.0))
                torch.mm(logits.to(weight.dtype), weight, out=gradients[start:stop])
        ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (gradients,) = ctx.saved_tensors
        return gradients * outputs[0][:, None].to(gradients.dtype), None, None, None


@torch.no_grad()
def output_layer(model: Any) -> OutputLayer | None:
    """A causal language model's output layer; None where its logits are more than the product of a frozen
    matrix and its last states (a bias, a bound, a scale).
    """
    matrix = model.get_output_embeddings()
    if type(matrix) is not nn.Linear or matrix.bias is not None:
        return None
    found = OutputLayer(matrix)
    ids = torch.arange(1, 4, device=matrix.weight.device)[None] % len(matrix.weight)
    try:
        states = found.states(model, input_ids=ids)
    except (ValueError, RuntimeError, IndexError):
        return None
    logits = model(input_ids=ids).logits.float()
    same = functional.linear(states, matrix.weight.to(states.dtype)).float()
    return found if logits.shape == same.shape and torch.allclose(logits, same, atol=1e-5) else None
