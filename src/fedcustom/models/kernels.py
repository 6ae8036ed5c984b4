"""Faster kernels for the same functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def fuse_activations(model: Any) -> None:
    """Replace the tanh form of GELU that ``transformers`` writes out operation by operation with torch's
    fused one. The function is the same.
    """
    from transformers.activations import FastGELUActivation, NewGELUActivation

    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, NewGELUActivation | FastGELUActivation):
                setattr(parent, name, nn.GELU(approximate="tanh"))


def attend_in_float32_on_processors() -> None:
    """Let ``transformers`` compute attention in float32 where a processor trains in bfloat16.

    Torch's backward pass of attention in bfloat16 takes ten times as long there as in float32, and longer
    than all matrix products of a small model together. Whatever else attention is asked for goes on as
    before. It holds for the whole process, as ``transformers`` has one such function for all models.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any
    ) -> tuple[Tensor, None]:
        kind = query.dtype
        if query.device.type != "cpu" or kind != torch.bfloat16 or not torch.is_grad_enabled():
            return sdpa_attention_forward(module, query, key, value, *arguments, **options)
        with torch.autocast("cpu", enabled=False):
            states, weights = sdpa_attention_forward(
                module, query.float(), key.float(), value.float(), *arguments, **options
            )
        return states.to(kind), weights

    AttentionInterface.register("sdpa", attend)
