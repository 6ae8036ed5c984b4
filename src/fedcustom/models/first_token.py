"""The last layer of an encoder that is classified by its first token: computed for that token alone."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from .lower import transformer_layers

AFTER_ATTENTION = ("attention.output", "attention.LayerNorm", "sa_layer_norm", "mlp_norm")
"""Where a layer goes on once its tokens have looked at each other: in the families of BERT, MPNet, DistilBERT
and ModernBERT.
"""


class _Pass(threading.local):
    """Whether the thread is in a pass of the whole classifier."""

    classifies = False


_PASS = _Pass()


@torch.no_grad()
def first_token_only(model: Any) -> bool:
    """Let a classifier compute what follows attention in its last layer for the first token alone, where
    nothing else reaches its logits; whether it does so now.

    That saves an eighth of the products of six layers whose feed-forward parts are four times as wide.
    Passes of the body by itself stay whole. A pass with and one without must give the same logits; otherwise
    the model is left as it is.
    """
    found = transformer_layers(model)
    if found is None:
        return False
    last = dict(found[1][-1].named_modules())
    vocabulary = len(model.get_input_embeddings().weight)
    ids = torch.arange(3, 13, device=model.device).view(2, 5) % vocabulary
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], device=model.device)
    for name in AFTER_ATTENTION:
        if name not in last:
            continue
        whole = model(input_ids=ids, attention_mask=mask).logits
        hooks = [
            model.register_forward_pre_hook(_begin),
            model.register_forward_hook(_end, always_call=True),
            last[name].register_forward_pre_hook(_first),
        ]
        try:
            if torch.allclose(model(input_ids=ids, attention_mask=mask).logits, whole, atol=1e-5):
                return True
        except RuntimeError:
            pass
        for hook in hooks:
            hook.remove()
    return False


def _begin(model: Any, arguments: Any) -> None:
    _PASS.classifies = True


def _end(model: Any, arguments: Any, result: Any) -> None:
    _PASS.classifies = False


def _first(module: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """(rows, tokens, width) to (rows, 1, width)."""
    return tuple(states[:, :1] for states in arguments) if _PASS.classifies else None
