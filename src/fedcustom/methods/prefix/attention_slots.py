"""Attention slots: learnt key-value pairs beside attention, outside of its softmax.

This file stands alone (``torch`` and ``transformers``): a copy of it is saved beside customised models.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

SETTING = "prefix_memory"
"""What the attribute of a configuration is called that :func:`add_slots` reads."""


class AttentionSlots(nn.Module):
    """What the slots of one attention block add to the output and to the query of each head h::

        o_h += sum_j act(q_h . k_hj / sqrt(d)) v_hj  +  M_h^T q_h / rms(q_h)
        q_h += sum_j act(q_h . k_hj / sqrt(d)) u_hj

    ``keys`` k are (heads, slots, d), ``values`` v (heads, slots, e), where e is the size of a head's output.
    ``shifts`` u of (heads, slots, d) are there if asked for, and so is M, ``linear``, of (heads, d, e). Keys
    are drawn from N(0, 1), all others are zero at first: nothing is added. Queries q are those of the block's
    matrix, before any rotation and normalisation of heads. Attention itself sees the shifted queries.
    """

    def __init__(
        self,
        heads: int,
        slots: int,
        size: int,
        value_size: int,
        activation: str,
        *,
        linear: bool = False,
        shifts: bool = False,
    ) -> None:
        super().__init__()
        self.activation = ACT2FN[activation]
        self.keys = nn.Parameter(torch.randn(heads, slots, size))
        self.values = nn.Parameter(torch.zeros(heads, slots, value_size))
        if shifts:
            self.shifts = nn.Parameter(torch.zeros(heads, slots, size))
        if linear:
            self.linear = nn.Parameter(torch.zeros(heads, size, value_size))

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor | None]:
        """Queries (rows, tokens, heads, d) to what is added to the outputs, (rows, tokens, heads, e), and to
        the queries themselves, (rows, tokens, heads, d), or None.
        """
        return self.read(query, dict(self.named_parameters(recurse=False)), "h")

    def read(self, query: Tensor, own: Mapping[str, Tensor], axes: str) -> tuple[Tensor, Tensor | None]:
        """The same with these tensors, whose dimensions but for the last two are ``axes``: h, heads, or rh,
        rows and heads.
        """
        kind = query.dtype
        # A processor computes such small products in bfloat16 by code that it compiles for each shape.
        exact = torch.float32 if query.device.type == "cpu" and kind == torch.bfloat16 else kind
        with torch.autocast(query.device.type, enabled=False):
            query, own = query.to(exact), {name: tensor.to(exact) for name, tensor in own.items()}
            keys = own["keys"] / math.sqrt(query.shape[-1])
            strengths = self.activation(torch.einsum(f"rthd,{axes}sd->rths", query, keys))
            added = torch.einsum(f"rths,{axes}se->rthe", strengths, own["values"])
            if "linear" in own:
                unit = query * torch.rsqrt(query.float().square().mean(-1, keepdim=True) + 1e-6).to(exact)
                added = added + torch.einsum(f"rthd,{axes}de->rthe", unit, own["linear"])
            if "shifts" not in own:
                return added.to(kind), None
            return added.to(kind), torch.einsum(f"rths,{axes}sd->rthd", strengths, own["shifts"]).to(kind)


class Passing(threading.local):
    """What a block's queries give to its output; each thread has its own."""

    added: Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Passing, ()  # a copy of the model has its own


def add_slots(model: nn.Module, memory: Mapping[str, Any]) -> dict[str, AttentionSlots]:
    """Put slots beside the attention blocks of a model, in place; by the names of their modules.

    ``memory`` has ``slots``, ``activation``, ``linear``, ``shifts`` and ``places``: of each block the module
    ``query``, whose output holds the queries, and the module ``output``, whose input is the heads' outputs;
    ``heads`` of ``size`` and ``value_size``; head h's query begins at ``first + h * step`` of the query's
    output.
    Both modules see (rows, tokens, width).
    """
    added = {}
    for place in memory["places"]:
        query, output = (model.get_submodule(place[key]) for key in ("query", "output"))
        slots = AttentionSlots(
            place["heads"], memory["slots"], place["size"], place["value_size"], memory["activation"],
            linear=memory["linear"], shifts=memory.get("shifts", False),
        )  # fmt: skip
        query.add_module("slots", slots)
        passing = Passing()
        query.register_forward_hook(partial(_read, passing, place))
        output.register_forward_pre_hook(partial(_add, passing))
        # A pass may end in between, by an error or where a checkpointed layer has been recomputed far enough.
        block = model.get_submodule(_around(place["query"], place["output"]))
        block.register_forward_hook(partial(_forget, passing), always_call=True)
        added[f"{place['query']}.slots"] = slots
    layers = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    for module in list(model.modules()):
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(partial(_let_gradients_in, layers))
    return added


def _around(one: str, other: str) -> str:
    """The name of the innermost module that holds both."""
    shared = []
    for part, same in zip(one.split(".")[:-1], other.split(".")[:-1], strict=False):
        if part != same:
            break
        shared.append(part)
    return ".".join(shared)


def _read(passing: Passing, place: Mapping[str, Any], module: Any, _: Any, output: Tensor) -> Tensor | None:
    """Let the slots see the queries in a matrix's output; the output with shifted queries, if they are."""
    heads, size, first, step = (place[key] for key in ("heads", "size", "first", "step"))
    added, shift = module.slots(_queries(output, heads, size, first, step))
    passing.added = added.flatten(-2)
    if shift is None:
        return None
    shifted = output.clone()
    _queries(shifted, heads, size, first, step).add_(shift)
    return shifted


def _queries(output: Tensor, heads: int, size: int, first: int, step: int) -> Tensor:
    """The view (rows, tokens, heads, size) of the queries in a matrix's output."""
    if step == size:
        return output[..., first : first + heads * size].view(*output.shape[:-1], heads, size)
    return output.view(*output.shape[:-1], heads, step)[..., first : first + size]


def _add(passing: Passing, _: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    states, *more = inputs
    added, passing.added = passing.added, None
    if added is None:
        raise ValueError("the output of attention is computed without its queries")
    if added.shape[1] > states.shape[1] == 1:  # a last layer that goes on with the first token alone
        added = added[:, :1]
    if added.shape != states.shape:
        raise ValueError(f"attention gives {tuple(states.shape)}, its queries {tuple(added.shape)}")
    return (states + added.to(states.dtype), *more)


def _forget(passing: Passing, *_: Any) -> None:
    passing.added = None


def _let_gradients_in(layers: list[nn.Module], module: nn.Module, _: Any, output: Tensor) -> None:
    """A checkpointed layer (reentrant) has gradients only if its input has; those of frozen embeddings have
    none.
    """
    if not module.training or not torch.is_grad_enabled() or not output.is_floating_point():
        return
    if any(layer.gradient_checkpointing for layer in layers):
        output.requires_grad_(True)
