"""Prefix initialisation from a real text: its keys and values in the frozen base model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...models.load import Base


def text_prefix(base: Base, text: str, length: int) -> Tensor:
    """Keys and values of ``text``'s first ``length`` tokens, (layers, 2, key-value heads, length, head size).

    A text that is too short is repeated. An encoder-decoder gives those of its decoder. Keys carry the
    positions 0 to length - 1, and the input, which a prefix pushes back by ``length``, follows on them.
    """
    tokens = base.tokenizer(text, add_special_tokens=False, truncation=True, max_length=length)["input_ids"]
    start = base.tokenizer.bos_token_id
    if base.architecture == "decoder" and start is not None:
        tokens = [start, *tokens]  # decoders rest much of their attention on the first token
    tokens = (tokens * (length // len(tokens) + 1))[:length]
    ids = torch.tensor([tokens], device=base.device)
    with torch.no_grad():
        pairs = [(key[0], value[0]) for key, value in _cache(base, ids)]
    return torch.stack([torch.stack(pair) for pair in pairs]).float()


def _cache(base: Base, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each layer's keys and values, (1, heads, tokens, size), of self-attention."""
    from transformers import DynamicCache, EncoderDecoderCache

    body: Any = getattr(base.model, base.model.base_model_prefix, base.model)
    body.eval()
    cache = DynamicCache()
    if base.architecture == "encoder-decoder":
        body(
            input_ids=ids,
            decoder_input_ids=ids,
            past_key_values=EncoderDecoderCache(cache, DynamicCache()),
            use_cache=True,
        )
    else:
        body(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers]
