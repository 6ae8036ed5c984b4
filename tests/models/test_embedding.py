"""Embeddings against a computation by hand, text by text."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedcustom.data.examples import LearningTask
from fedcustom.models.embedding import embed
from fedcustom.models.load import load_base
from fedcustom.models.settings import ModelSettings

TASK = LearningTask("classification", ("a", "b"))
TEXTS = ["the old cat sees a house", "soup", "a river near the small school and then the garden"]


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "bart"])
def test_mean_of_states(kind: str, tiny: dict[str, str]) -> None:
    base = load_base(ModelSettings(base=tiny[kind]), TASK, 0, head=False)
    assert base.head == ()
    vectors = embed(base, TEXTS, max_length=8, batch_size=2)
    for text, vector in zip(TEXTS, vectors, strict=True):
        ids = torch.tensor([base.tokenizer(text)["input_ids"][:8]])
        body = {"bert": base.model, "llama": getattr(base.model, "model", None)}.get(kind)
        if kind == "gpt2":
            body = base.model.transformer
        if kind == "bart":
            body = base.model.model.encoder
        with torch.no_grad():
            mean = body(input_ids=ids).last_hidden_state[0].mean(dim=0)  # type: ignore[misc]
        np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=1e-5)


def test_the_built_in_encoder_knows_what_is_alike() -> None:
    base = load_base(ModelSettings(base="builtin:minilm"), TASK, 0, head=False)
    vectors = embed(base, ["a cat sat down", "a kitten took a seat", "interest rates rose"], max_length=32)
    near, far = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert near > 0.5 > 0.2 > far
