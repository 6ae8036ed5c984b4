"""Checkpoints that lack weights of the model that is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from helpers.tiny_models import tiny_tokenizer

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES: dict[str, Any] = {
    "vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip

LACKING = ("bert", "albert", "roberta", "llama", "gpt2", "opt")
"""The kinds of :func:`lacking_checkpoint`."""


def lacking_checkpoint(kind: str, folder: Path) -> tuple[str, str, tuple[str, ...]]:
    """A folder with a model and a tokenizer, the task to train for, and the names of weights outside a head
    that the checkpoint lacks. Masked language models have no pooling layer, bodies no output layer; ALBERT's
    and OPT's embeddings have another width than their states.
    """
    import transformers as t

    missing: tuple[str, ...] = ()
    torch.manual_seed(5)
    if kind == "bert":
        model: Any = t.BertForMaskedLM(t.BertConfig(**SIZES, pad_token_id=0))
        missing = ("bert.pooler.dense.weight", "bert.pooler.dense.bias")
    elif kind == "albert":
        model = t.AlbertForMaskedLM(t.AlbertConfig(**SIZES, embedding_size=16, pad_token_id=0))
        missing = ("albert.pooler.weight", "albert.pooler.bias")
    elif kind == "roberta":
        model = t.RobertaForMaskedLM(t.RobertaConfig(**SIZES, pad_token_id=0))
    elif kind == "llama":
        sizes = SIZES | SPECIAL | {"num_key_value_heads": 2, "tie_word_embeddings": False}
        model, missing = t.LlamaModel(t.LlamaConfig(**sizes)), ("lm_head.weight",)
    elif kind == "gpt2":
        sizes = {"vocab_size": 400, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        model = t.GPT2Model(t.GPT2Config(**sizes, tie_word_embeddings=False, **SPECIAL))
        missing = ("lm_head.weight",)
    elif kind == "opt":
        sizes = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        more = {"ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 16}
        model = t.OPTForCausalLM(t.OPTConfig(**sizes, **more, **SPECIAL))
    else:
        raise ValueError(kind)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    task = "generation" if kind in ("llama", "gpt2", "opt") else "classification"
    return str(folder), task, missing
