"""Chat templates of well-known models, and a tokenizer that has their control tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers.byte_level import byte_level_tokenizer

TEMPLATES = Path(__file__).parent.parent / "data" / "chat_templates"

CONTROL = {
    "smollm2": ["<|im_start|>", "<|im_end|>"],
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "chatml_marked": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "mistral": [],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "phi3": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
}
"""The control tokens of each template beside <s> and </s>."""

END = {name: (tokens or ["</s>"])[1 if len(tokens) == 2 else -1] for name, tokens in CONTROL.items()}
"""The token that ends an answer."""

WORDS = ["the old cat sees a small dog near that house", "What is the name of this town? It is Ulm."]


def template(name: str) -> str:
    """The text of a template."""
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def chat_tokenizer(name: str, *, padded_by_end: bool = False, texts: Sequence[str] = WORDS) -> Any:
    """A small byte-level tokenizer with the template of that name, which begins every plain text with <s>.

    With ``padded_by_end`` the token that ends an answer is the padding and the end token, as in SmolLM2.
    """
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_level_tokenizer(texts)
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL[name]})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    if padded_by_end:
        tokenizer.pad_token = tokenizer.eos_token = END[name]
    tokenizer.chat_template = template(name)
    return tokenizer
