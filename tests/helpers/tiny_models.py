"""Randomly initialised models of a few thousand weights, and their tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.byte_level import byte_level_tokenizer
from helpers.rows import make_rows


def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer of up to 400 tokens, trained on the rows' texts."""
    texts = [f"{row['text']} {row['source']} {row['target']}" for row in make_rows(400, 9)]
    return byte_level_tokenizer(texts)


def tiny_model(kind: str) -> Any:
    """A randomly initialised model of a few thousand weights."""
    import transformers as t

    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "bert":
        return t.BertModel(
            t.BertConfig(
                vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                intermediate_size=48, max_position_embeddings=64, pad_token_id=0,
            )
        )  # fmt: skip
    if kind == "llama":
        return t.LlamaForCausalLM(
            t.LlamaConfig(
                vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64,
                tie_word_embeddings=True, **special,
            )
        )  # fmt: skip
    if kind == "gpt2":
        return t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=64, **special)
        )
    if kind == "bart":
        return t.BartForConditionalGeneration(
            t.BartConfig(
                vocab_size=400, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
                decoder_start_token_id=2, forced_eos_token_id=None, **special,
            )
        )  # fmt: skip
    raise ValueError(kind)


def sentence_files(folder: Path, pooling: Any, *, normalize: bool) -> Path:
    """Make an encoder's folder a sentence-transformers one; ``pooling`` is its configuration of that, or the
    text of one.
    """
    kinds = {"": "Transformer", "1_Pooling": "Pooling"} | ({"2_Normalize": "Normalize"} if normalize else {})
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    for path in list(kinds)[1:]:
        (folder / path).mkdir()
    said = pooling if isinstance(pooling, str) else json.dumps({"word_embedding_dimension": 32, **pooling})
    (folder / "1_Pooling" / "config.json").write_text(said)
    return folder
