"""Last layer of a decoder that classifies, computed for the token that logits are read off.

A layer's keys and values are needed of all tokens; its queries, what attention gives, and the feed-forward
network only of that one. Of the products of GPT-2's layer, 9/12 of those with hidden units four times as wide
are left out, or 10/12 where queries have a matrix of their own or nothing is attached to the common one.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from .first_token import classifying, places_read
from .frozen_layers import transformer_layers

TOLERANCE = 1e-5
"""Difference of logits that rounding explains."""


@torch.no_grad()
def last_token_only(model: Any) -> bool:
    """While :func:`~.first_token.classifying`, let a decoder's classifier compute its last layer for the
    token alone that its logits are read off; whether it can.

    It can where the layer is of a known form (:data:`FORMS`), attention is torch's or plain, no dropout is
    active, and a trial gives the same logits; otherwise the model is left as it is.
    """
    found, form = transformer_layers(model), FORMS.get(model.config.model_type)
    pad = getattr(model.config, "pad_token_id", None)
    config = model.config
    if found is None or form is None or pad is None or getattr(config, "add_cross_attention", False):
        return False
    if config._attn_implementation not in ("sdpa", "eager") or getattr(
        config, "reorder_and_upcast_attn", False
    ):
        return False
    layer = found[1][-1]
    kind, parts = form
    if any(not _has(layer, part) for part in parts) or "forward" in layer.__dict__:
        return False
    vocabulary = len(model.get_input_embeddings().weight)
    ids = torch.arange(3, 18, device=model.device).view(3, 5) % vocabulary
    ids[ids == pad] = (pad + 1) % vocabulary
    ids[1, 3:] = pad
    ids[2, :2] = pad
    mask = (ids != pad).long()
    whole = model(input_ids=ids, attention_mask=mask).logits
    layer.__dict__["forward"] = partial(_forward, layer, kind, pad)
    try:
        with classifying(ids):
            if torch.allclose(model(input_ids=ids, attention_mask=mask).logits, whole, atol=TOLERANCE):
                return True
    except (RuntimeError, TypeError, AttributeError, LookupError):
        pass
    del layer.__dict__["forward"]
    return False


def _has(module: nn.Module, part: str) -> bool:
    try:
        return module.get_submodule(part) is not None
    except AttributeError:
        return False


def _forward(layer: Any, form: Callable[..., Tensor], pad: int, *arguments: Any, **named: Any) -> Any:
    """The layer's pass: (rows, tokens, width) to the same, in which every token has the state of the one that
    logits are read off.
    """
    plain = type(layer).forward
    names = list(inspect.signature(plain).parameters)[1:]
    given = dict(zip(names, arguments, strict=False)) | named
    states, mask = given["hidden_states"], given.get("attention_mask")
    places = places_read(pad, states)
    usable = mask is None or (isinstance(mask, Tensor) and mask.dim() == 4)
    if places is None or not usable or layer.training:
        return plain(layer, *arguments, **named)
    return form(layer, states, places, mask, given).expand(-1, states.shape[1], -1)


def _separate(
    layer: Any, states: Tensor, places: Tensor, mask: Tensor | None, given: dict[str, Any]
) -> Tensor:
    """A layer with a matrix each for queries, keys and values, whose queries and keys are rotated, and
    perhaps normalised: Llama's and its kin's. The token's state, (rows, 1, width).
    """
    attention = layer.self_attn
    normed = layer.input_layernorm(states)
    query = attention.q_proj(_at(normed, places)).unflatten(-1, (-1, attention.head_dim))
    key, value = (
        matrix(normed).unflatten(-1, (-1, attention.head_dim))
        for matrix in (attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
    cos, sin = given["position_embeddings"]
    rotate = vars(sys.modules[type(attention).__module__])["apply_rotary_pos_emb"]
    own = [_at(part.expand(len(states), -1, -1), places) for part in (cos, sin)]
    query, key = rotate(query, query, *own)[0], rotate(key, key, cos, sin)[1]
    result = attention.o_proj(_attend(attention, query, key, value, places, mask, given))
    after = _at(states, places) + result
    state: Tensor = after + layer.mlp(layer.post_attention_layernorm(after))
    return state


def _common(layer: Any, states: Tensor, places: Tensor, mask: Tensor | None, given: dict[str, Any]) -> Tensor:
    """A layer with one matrix for queries, keys and values: GPT-2's. The token's state, (rows, 1, width)."""
    attention = layer.attn
    normed = layer.ln_1(states)
    both, width = attention.c_attn, attention.split_size
    if type(both) is Conv1D and not (both._forward_hooks or both._forward_pre_hooks):
        flat = torch.addmm(both.bias[width:], normed.flatten(0, 1), both.weight[:, width:])
        key, value = flat.view(*normed.shape[:2], 2 * width).chunk(2, dim=2)
    else:  # what is attached acts on all three
        _, key, value = both(normed).chunk(3, dim=2)
    query = both(_at(normed, places))[..., :width]  # after the others: slots go on from the last call
    query, key, value = (
        part.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for part in (query, key, value)
    )
    result = attention.c_proj(_attend(attention, query, key, value, places, mask, given))
    after = attention.resid_dropout(result) + _at(states, places)
    state: Tensor = after + layer.mlp(layer.ln_2(after))
    return state


FORMS: dict[str, tuple[Callable[..., Tensor], Sequence[str]]] = {
    "gpt2": (_common, ("attn.c_attn", "attn.c_proj", "ln_1", "ln_2", "mlp")),
} | dict.fromkeys(
    ("llama", "mistral", "qwen2", "qwen3"),
    (
        _separate,
        (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "input_layernorm", "post_attention_layernorm", "mlp",
        ),
    ),
)  # fmt: skip
"""By the configurations' names of decoders: how a layer is computed, and the modules that it needs."""


def _attend(
    attention: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    places: Tensor,
    mask: Tensor | None,
    given: dict[str, Any],
) -> Tensor:
    """What attention gives a query of one token, (rows, heads, 1, size), of keys and values, (rows, key-value
    heads, tokens, size): (rows, 1, heads x size).
    """
    tokens, cache = key.shape[2], given.get("past_key_values")
    if cache is not None:
        key, value = cache.update(key, value, attention.layer_idx)
    own = _row(mask, places, key.shape[2] - tokens, key.shape[2])
    implementation = attention.config._attn_implementation
    if implementation == "eager":
        attend = vars(sys.modules[type(attention).__module__])["eager_attention_forward"]
        if own.dtype == torch.bool:
            own = torch.zeros_like(own, dtype=query.dtype).masked_fill(~own, torch.finfo(query.dtype).min)
    else:
        attend = ALL_ATTENTION_FUNCTIONS[implementation]
    states: Tensor = attend(attention, query, key, value, own, dropout=0.0, scaling=attention.scaling)[0]
    return states.flatten(-2).contiguous()


def _row(mask: Tensor | None, places: Tensor, before: int, keys: int) -> Tensor:
    """What one token attends to, (rows, heads or 1, 1, keys); ``before`` the tokens there are that many keys.
    Without a mask those are all up to itself.
    """
    if mask is None:
        seen = torch.arange(keys, device=places.device) <= (places + before).unsqueeze(1)
        return seen[:, None, None]
    rows = torch.arange(len(places), device=places.device)
    return mask.expand(len(places), -1, -1, -1)[rows, :, places].unsqueeze(2)


def _at(states: Tensor, places: Tensor) -> Tensor:
    """(rows, tokens, width) to the tokens' at these places, (rows, 1, width)."""
    rows = torch.arange(len(places), device=states.device)
    return states[rows, places].unsqueeze(1)
