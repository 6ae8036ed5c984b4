"""The setting ``model.attention``."""

from __future__ import annotations

import pytest
import torch

from fedcustom.core.errors import ModelError
from fedcustom.data.examples import LearningTask
from fedcustom.models.load import load_base
from fedcustom.models.settings import ModelSettings


@pytest.mark.parametrize("kind", ["bert", "sentence", "llama", "gpt2", "bart"])
def test_implementations_give_the_same(tiny: dict[str, str], sentence: str, kind: str) -> None:
    folder = sentence if kind == "sentence" else tiny[kind]
    classifies = kind in ("bert", "sentence")
    task = LearningTask("classification", ("a", "b")) if classifies else LearningTask("generation")
    ids = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    found = []
    for name in ("eager", "sdpa"):
        base = load_base(ModelSettings(base=folder, attention=name), task, seed=0)  # type: ignore[arg-type]
        inner = getattr(base.model, base.model.base_model_prefix)
        assert inner.config._attn_implementation == name
        with torch.no_grad():
            logits = base.model(input_ids=ids, attention_mask=mask).logits
        found.append(logits if classifies else logits[mask.bool()])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_flash_attention_without_a_gpu_is_refused_in_one_line(tiny: dict[str, str]) -> None:
    settings = ModelSettings(base=tiny["llama"], attention="flash_attention_2", device="cpu")
    with pytest.raises(ModelError, match=r"needs a GPU; this run trains on cpu; allowed: auto, sdpa, eager$"):
        load_base(settings, LearningTask("generation"), seed=0)
