"""Models and batches as a user of transformers has them, without this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedcustom.data.examples import Example


def plain(path: str | Path, kind: str, model: str) -> Any:
    """The model as a user of transformers loads it, code beside it included, with the head that every method
    begins with.
    """
    import transformers as t

    trusted: dict[str, Any] = {"trust_remote_code": True}

    torch.manual_seed(0)
    if kind == "classification":
        return t.AutoModelForSequenceClassification.from_pretrained(path, num_labels=3, **trusted).eval()
    loader = t.AutoModelForSeq2SeqLM if model == "bart" else t.AutoModelForCausalLM
    return loader.from_pretrained(path, **trusted).eval()


def plain_batch(path: str, kind: str, model: str, examples: list[Example]) -> dict[str, Tensor]:
    """The examples as one padded batch, with labels on the target's tokens alone."""
    import transformers as t

    tokenizer = t.AutoTokenizer.from_pretrained(path)

    def padded(texts: list[str]) -> dict[str, Tensor]:
        return dict(tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False))

    end = tokenizer.eos_token
    if kind == "classification":
        return {**padded([e.text for e in examples]), "labels": torch.tensor([e.label for e in examples])}
    if model == "bart":
        targets = padded([f"{e.target}{end}" for e in examples])
        labels = targets["input_ids"].masked_fill(targets["attention_mask"] == 0, -100)
        return {**padded([e.text for e in examples]), "labels": labels}
    batch = padded([f"{e.text}{e.target}{end}" for e in examples])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, e in enumerate(examples):
        labels[row, : len(tokenizer(e.text)["input_ids"])] = -100
    return {**batch, "labels": labels}


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**batch).logits
    return result


def watched(model: Any, name: str) -> list[int]:
    """How many tokens a row the module sees in each pass from now on."""
    seen: list[int] = []
    model.get_submodule(name).register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    return seen
