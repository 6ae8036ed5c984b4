"""Prefix initialisation from a real text: its keys and values in the frozen base model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.errors import ModelError
from ...models.load import Base
from ...models.padding import trial


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


def cache_shape(base: Base) -> tuple[int, int, int]:
    """Layers, key-value heads and head size of what the model keeps of a text in its self-attention.

    Raises:
        ModelError: they are not the same in all layers, or some layers keep something else.
    """
    ids = torch.tensor([[base.tokenizer.pad_token_id]], device=base.device)
    with torch.no_grad():
        pairs = _cache(base, ids)
    shapes = {tuple(each.shape) for pair in pairs for each in pair}
    if len(shapes) != 1:
        raise ModelError(
            f"method prefix does not fit {base.name}: not all layers of its {base.model.config.model_type} "
            "code have keys and values of one shape; use method soft_prompt or lora"
        )
    (shape,) = shapes
    return len(pairs), shape[1], shape[3]


def _cache(base: Base, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each layer's keys and values, (1, heads, tokens, size), of self-attention."""
    from transformers import DynamicCache, EncoderDecoderCache

    body: Any = getattr(base.model, base.model.base_model_prefix, base.model)
    body.eval()
    cache, kind = DynamicCache(), base.model.config.model_type

    def refusal(reason: str) -> str:
        return (
            f"method prefix does not fit {base.name}: its {kind} code does not take keys and values from "
            f"outside ({reason[:120]}); use method soft_prompt or lora"
        )

    with trial(body, refusal):
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
    pairs: list[Any] = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    if not pairs or not all(isinstance(each, Tensor) and each.dim() == 4 for pair in pairs for each in pair):
        raise ModelError(
            f"method prefix does not fit {base.name}: not all layers of its {base.model.config.model_type} "
            "code keep keys and values; use method soft_prompt or lora"
        )
    return pairs
