"""Matrix products of rows of several clients, each with a matrix of its client's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ....models.products import compiled_by_shape, product

SMALL = 4e6
"""Floating-point operations of a client's product up to which a processor makes it sooner in float32, without
compiling anything, than in bfloat16.
"""


def client_products(states: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
    """``x W_k^T`` of each client's rows x.

    Args:
        states: (rows, ..., in), sorted by client.
        weight: (clients, out, in).
        counts: how many rows each client has.

    Returns:
        (rows, ..., out).
    """
    clients, _, width = weight.shape
    compiled = compiled_by_shape(states)
    if len(set(counts)) == 1 and not compiled:
        together = torch.bmm(states.reshape(clients, -1, width), weight.to(states.dtype).transpose(1, 2))
        return together.view(*states.shape[:-1], -1)
    operations = 2 * states.numel() * weight.shape[1] / clients
    if states.device.type == "cpu" and operations < SMALL:
        result: Tensor = _SmallProducts.apply(states, weight, list(counts))  # type: ignore[no-untyped-call]
        return result
    if one_kernel_for_all(states, weight):
        return grouped_products(states, weight, counts)
    parts = zip(torch.split(states, list(counts)), weight.to(states.dtype).unbind(), strict=True)
    return torch.cat([product(rows, own) for rows, own in parts])


def one_kernel_for_all(states: Tensor, weight: Tensor) -> bool:
    """Whether a GPU can make products with unlike numbers of rows in one kernel: in bfloat16, from compute
    capability 8.0, of rows of 16 bytes or multiples of that.
    """
    if states.device.type != "cuda" or any(size % 8 for size in weight.shape[1:]):
        return False
    in_bfloat16 = (
        torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else states.dtype
    ) == torch.bfloat16
    return in_bfloat16 and torch.cuda.get_device_capability(states.device) >= (8, 0)


def grouped_products(states: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
    """The products in bfloat16, by :func:`torch.nn.functional.grouped_mm`."""
    per_row = states.numel() // (len(states) * states.shape[-1])
    ends = torch.tensor([count * per_row for count in counts]).cumsum(0).to(states.device, torch.int32)
    rows = states.reshape(-1, states.shape[-1]).to(torch.bfloat16)
    result = functional.grouped_mm(rows, weight.to(torch.bfloat16).transpose(1, 2), offs=ends)
    if result.requires_grad:  # its backward pass does not take every layout
        result.register_hook(Tensor.contiguous)  # type: ignore[no-untyped-call]
    return result.view(*states.shape[:-1], -1)


class _SmallProducts(torch.autograd.Function):
    """One product after the other, without what autograd adds to each."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else states.dtype
        exact = exact_for(kind)
        with torch.autocast("cpu", enabled=False):
            result = torch.empty(*states.shape[:-1], weight.shape[1], dtype=exact)
            for rows, own, out in _each(counts, states.to(exact), weight.to(exact), result):
                torch.mm(rows, own.t(), out=out)
        ctx.save_for_backward(states.to(kind), weight)
        ctx.counts, ctx.kind = counts, states.dtype
        return result.to(kind)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        states, weight = ctx.saved_tensors
        exact = exact_for(states.dtype)
        of_states = of_weight = None
        with torch.autocast("cpu", enabled=False):
            gradient, own = gradients[0].to(exact), weight.to(exact)
            if ctx.needs_input_grad[0]:
                of_states = torch.empty(states.shape, dtype=exact)
                for rows, matrix, out in _each(ctx.counts, gradient, own, of_states):
                    torch.mm(rows, matrix, out=out)
                of_states = of_states.to(ctx.kind)
            if ctx.needs_input_grad[1]:
                of_weight = torch.empty_like(own)
                for rows, out, inputs in _each(ctx.counts, gradient, of_weight, states.to(exact)):
                    torch.mm(rows.t(), inputs, out=out)
                of_weight = of_weight.to(weight.dtype)
        return of_states, of_weight, None


def exact_for(kind: torch.dtype) -> torch.dtype:
    """The precision in which small products are made for results of a kind."""
    return torch.float32 if kind in (torch.bfloat16, torch.float16) else kind


def _each(
    counts: Sequence[int], rows: Tensor, matrices: Tensor, others: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each client's rows, (tokens, width), its matrix, and its part of others, (tokens, width)."""
    per_row = rows.numel() // (len(rows) * rows.shape[-1])
    tokens = [count * per_row for count in counts]
    first, second = (torch.split(tensor.reshape(-1, tensor.shape[-1]), tokens) for tensor in (rows, others))
    return zip(first, matrices.unbind(), second, strict=True)
