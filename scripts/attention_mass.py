"""How much of its attention a model gives to key-value pairs in front of a text, and what that does to the
text's vector, before anything is trained.

    python scripts/attention_mass.py ../shared/data/trec/train.jsonl --limit 200

The shares are read off the model's own attention weights. Texts are in a JSONL file, under ``text``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from fedcustom.data.examples import LearningTask
from fedcustom.methods.prefix.init import text_prefix
from fedcustom.methods.prefix.settings import TEXT
from fedcustom.models.load import Base, load_base
from fedcustom.models.settings import ModelSettings


def main() -> None:
    """Print a table: pairs, share of attention on them by layer, and how far the mean vector moves."""
    parser = argparse.ArgumentParser(description="Attention to key-value pairs before any training.")
    parser.add_argument("texts", type=Path)
    parser.add_argument("--base", default="builtin:minilm")
    parser.add_argument("--limit", type=int, default=200)
    arguments = parser.parse_args()
    lines = arguments.texts.read_text(encoding="utf-8").splitlines()[: arguments.limit]
    texts = [json.loads(line)["text"] for line in lines]
    base = load_base(ModelSettings(base=arguments.base), LearningTask("classification"), seed=0, head=False)
    base.model.set_attn_implementation("eager")
    print("pairs  start   share of attention on them by layer, and cosine to the base's vector")
    for length in (1, 4, 16):
        for start in ("zero", "text"):
            pairs = text_prefix(base, TEXT, length)
            shares, cosine = measure(base, texts, torch.zeros_like(pairs) if start == "zero" else pairs)
            row = "  ".join(f"{100 * share:5.1f} %" for share in shares)
            print(f"{length:>5}  {start:<6}  {row}    {cosine:.3f}")


@torch.no_grad()
def measure(base: Base, texts: list[str], pairs: Tensor) -> tuple[list[float], float]:
    """Each layer's mean share of attention on ``pairs`` of (layers, 2, heads, length, size), over heads and
    tokens, and the mean cosine between the mean-pooled vectors with and without them.
    """
    from transformers import DynamicCache

    shares = torch.zeros(len(pairs))
    cosine, length = 0.0, pairs.shape[3]
    for text in texts:
        ids = base.tokenizer(text, return_tensors="pt", truncation=True, max_length=48)["input_ids"]
        plain = base.model(input_ids=ids).last_hidden_state.mean(1)
        cache = DynamicCache()
        for layer, (key, value) in enumerate(pairs):
            cache.update(key[None], value[None], layer)
        mask = torch.ones(1, length + ids.shape[1], dtype=torch.long)
        output = base.model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, output_attentions=True,
        )  # fmt: skip
        moved = output.last_hidden_state.mean(1)
        cosine += torch.nn.functional.cosine_similarity(plain, moved).item()
        shares += torch.stack([weights[..., :length].sum(-1).mean() for weights in output.attentions])
    return (shares / len(texts)).tolist(), cosine / len(texts)


if __name__ == "__main__":
    main()
