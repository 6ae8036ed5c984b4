"""``model.device_map`` on a machine without GPUs: accelerate's hooks in place, all layers on the processor.

Layers on several devices are not tried here, nor key-value prefixes, for which PEFT asks for a device that is
no processor.
"""

from __future__ import annotations

from typing import Any

import accelerate
import pytest
import torch

from fedcustom.core.errors import ModelError, RecipeError
from fedcustom.data.examples import LearningTask
from fedcustom.methods.tuning.batching.trainer import clip_each
from fedcustom.models.load import Base, devices_of, load_base
from fedcustom.models.settings import ModelSettings
from fedcustom.recipe.recipe import load_recipe
from helpers import methods
from helpers.methods import SETTINGS, make
from helpers.rounds import distance, rounds

TRAINING = {"batch_size": 3, "clip_norm": 1.0, "optimizer": "sgd", "learning_rate": 0.1}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", ["lora", "prefix memory", "adapter", "soft_prompt", "ia3"])
def test_accelerates_hooks_change_nothing(
    tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch, name: str, checkpointed: bool
) -> None:
    """One by one without hooks, and in a cohort with them: blocks move their inputs to their own device."""
    training = {**TRAINING, "gradient_checkpointing": checkpointed}
    options: dict[str, Any] = {**SETTINGS[name], "training": training}
    expected = rounds(
        make(tiny["llama"], name.split()[0], "generation", **options), "generation", together=False
    )
    load = methods.load_base

    def hooked(settings: ModelSettings, *rest: Any, **more: Any) -> Base:
        base = load(settings.model_copy(update={"device_map": "auto"}), *rest, **more)
        assert base.devices == (torch.device("cpu"),)
        places: dict[str, Any] = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
        places |= {"model.layers.0": "cpu", "model.layers.1": "cpu", "lm_head": "cpu"}
        accelerate.dispatch_model(base.model, places, main_device="cpu", force_hooks=True)
        assert "forward" in base.model.model.layers[1].__dict__
        object.__setattr__(base, "devices", (torch.device("cpu"), torch.device("cpu", 0)))
        return base

    monkeypatch.setattr(methods, "load_base", hooked)
    for together in (True, False):
        method = make(tiny["llama"], name.split()[0], "generation", **options)
        assert method.base.spans
        found = rounds(method, "generation", together=together)
        for before, after in zip(expected, found, strict=True):
            gaps = {client: distance(update, after[client]) for client, update in before.items()}
            assert max(gaps.values()) < 1e-4, gaps  # float32: IA3 moves little from 1


def test_weights_on_no_device_are_refused() -> None:
    with torch.device("meta"):
        model = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"model\.device_map = 'auto': .* would stay off them"):
        devices_of(model)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"device_map": "auto", "device": "cpu"}, "device_map = 'auto': does not go with device = 'cpu'"),
        ({"device_map": "auto", "compile": True}, "device_map = 'auto': does not go with compile = true"),
        ({"quantization": "int8", "compile": True}, "quantization = 'int8': does not go with compile = true"),
    ],
)
def test_what_does_not_go_together_is_refused(
    generation: dict[str, Any], model: dict[str, Any], words: str
) -> None:
    generation["model"] |= model
    with pytest.raises(RecipeError, match=words):
        load_recipe(generation)


def test_clipping_is_that_of_each_client() -> None:
    gradients = [torch.randn(3, 4, 5), torch.randn(3, 7)]
    whole = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)
    scale = (0.5 / (whole.norm(dim=1) + 1e-6)).clamp(max=1.0)
    expected = [gradient * scale.view(3, *[1] * (gradient.dim() - 1)) for gradient in gradients]
    clip_each(gradients, 0.5)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_one_device_is_the_whole_map(tiny: dict[str, str]) -> None:
    base = load_base(ModelSettings(base=tiny["llama"], device_map="auto"), LearningTask("generation"), seed=0)
    assert (base.device, base.spans) == (torch.device("cpu"), False)
