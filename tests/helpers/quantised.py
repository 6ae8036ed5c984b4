"""Models for quantisation: wide enough for groups of 64 numbers, and what each scheme needs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.tiny_models import tiny_tokenizer

PACKAGES = {"int8": "torchao", "int4": "torchao", "nf4": "bitsandbytes"}


def needs(name: str) -> Any:
    """A parameter of a test that is left out where the scheme's package is missing."""
    lacking = importlib.util.find_spec(PACKAGES[name]) is None
    return pytest.param(name, marks=pytest.mark.skipif(lacking, reason=f"{PACKAGES[name]} is not installed"))


SCHEMES = [needs(name) for name in PACKAGES]


def wide_model(folder: Path, kind: str, *, dtype: torch.dtype = torch.float32, **shards: Any) -> str:
    """A random model of 64 units, two layers; Llama's feed-forward networks have 96, no multiple of 64."""
    import transformers as t

    torch.manual_seed(5)
    sizes: dict[str, Any] = {
        "vocab_size": 400, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    if kind == "bert":
        model: Any = t.BertModel(t.BertConfig(**sizes, intermediate_size=128))
    else:
        special = {"bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 2, "intermediate_size": 96}
        model = t.LlamaForCausalLM(t.LlamaConfig(**sizes, **special, tie_word_embeddings=True))
    model.to(dtype).save_pretrained(folder, **shards)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)
