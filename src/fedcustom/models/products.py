"""Matrix products in bfloat16 on a processor: in few shapes, since each new shape is compiled.

oneDNN, which makes them, compiles code for every number of rows that it has not met lately: 1 to 3 ms, ten
times what the product of a small model takes, and more than a megabyte of memory for each. Batches of texts
have a new number of rows nearly every time. Here rows of zeros are added, up to one of eight numbers between
two powers of two: 3 to 6 % more arithmetic on average.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

STEPS = 8
"""How many numbers of rows there are between two powers of two."""


class FewShapesLinear(nn.Linear):
    """``nn.Linear``, whose products on a processor in bfloat16 are :func:`product`'s."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return product(input, self.weight, self.bias)


def use_few_shapes(model: nn.Module) -> None:
    """Let all layers ``nn.Linear`` of a model, in place, make their products in few shapes."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FewShapesLinear


def product(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``states W^T + b`` of (..., in) and (out, in), as :func:`torch.nn.functional.linear` computes it."""
    rows = states.numel() // states.shape[-1]
    padded = padded_rows(rows)
    if padded == rows or not compiled_by_shape(states):
        return functional.linear(states, weight, bias)
    trained = any(tensor is not None and tensor.requires_grad for tensor in (weight, bias))
    if trained and torch.is_grad_enabled():
        more = functional.pad(states.reshape(rows, -1), (0, 0, 0, padded - rows))
        return functional.linear(more, weight, bias)[:rows].view(*states.shape[:-1], -1)
    result: Tensor = _FrozenProduct.apply(states, weight, bias, padded)  # type: ignore[no-untyped-call]
    return result


def padded_rows(rows: int) -> int:
    """The number of rows of the product that is made in place of one of so many."""
    step = max(STEPS, (1 << max(0, rows.bit_length() - 1)) // STEPS)
    return -(-rows // step) * step


def compiled_by_shape(states: Tensor) -> bool:
    """Whether products of these states are made by oneDNN here: on a processor, where bfloat16 is computed
    in.
    """
    return (
        states.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )


class _FrozenProduct(torch.autograd.Function):
    """The product with a weight and a bias that are not trained."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, padded: int) -> Tensor:
        kind = torch.get_autocast_dtype("cpu")
        weight = weight.to(kind)
        ctx.save_for_backward(weight)
        ctx.padded, ctx.kind = padded, states.dtype
        more = with_rows(states.to(kind), padded)
        result = torch.mm(more, weight.t()) if bias is None else torch.addmm(bias.to(kind), more, weight.t())
        return result[: states.numel() // states.shape[-1]].view(*states.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        (gradient,) = gradients
        result = torch.mm(with_rows(gradient.to(weight.dtype), ctx.padded), weight)
        rows = gradient.numel() // gradient.shape[-1]
        return result[:rows].view(*gradient.shape[:-1], -1).to(ctx.kind), None, None, None


def with_rows(states: Tensor, padded: int) -> Tensor:
    """States of (..., width) as (padded, width), zeros at the end."""
    width = states.shape[-1]
    rows = states.numel() // width
    more = states.new_empty(padded, width)
    more[:rows].view(states.shape).copy_(states)
    more[rows:].zero_()
    return more
