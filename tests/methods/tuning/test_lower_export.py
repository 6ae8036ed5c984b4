"""What is trained in upper layers alone: its export, resumed runs, and models that cannot take it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from pydantic import ValidationError

import fedcustom
from fedcustom.core.errors import ModelError, RunError
from fedcustom.methods import WeightTuning, registry
from fedcustom.methods.tuning.local_training import LocalTraining
from helpers.methods import MODELS, SETTINGS, make
from helpers.quantised import SCHEMES, wide_model
from helpers.rounds import distance, rounds
from helpers.runs import StopAt, tensors_of
from helpers.tiny_models import tiny_tokenizer

LOADERS = {
    "bert": t.AutoModelForSequenceClassification, "llama": t.AutoModelForCausalLM,
    "gpt2": t.AutoModelForCausalLM, "bart": t.AutoModelForSeq2SeqLM,
}  # fmt: skip


def upper(path: str, name: str, kind: str, first: int = 1, **more: Any) -> WeightTuning:
    return make(path, name.split()[0], kind, **SETTINGS[name], first_layer=first, **more)


def trained(path: str, name: str, kind: str, first: int = 1) -> WeightTuning:
    """A method whose tensors are not those of the start."""
    method, generator = upper(path, name, kind, first), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in method.trainable.parameters.values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return method


@pytest.mark.parametrize("name", ["adapter", "prefix memory", "prefix shifts"])
@pytest.mark.parametrize("model", MODELS)
def test_an_exported_model_is_the_trained_one(
    tiny: dict[str, str], tmp_path: Path, model: str, name: str
) -> None:
    method = trained(tiny[model], name, MODELS[model])
    method.trainable.save(tmp_path)
    ids = torch.randint(5, 300, (3, 7), generator=torch.Generator().manual_seed(2))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model == "bart":
        inputs["decoder_input_ids"] = ids
    loaded = LOADERS[model].from_pretrained(tmp_path, trust_remote_code=True).eval()
    with torch.no_grad():
        expected = method.trainable.model.eval()(**inputs).logits
        assert torch.allclose(loaded(**inputs).logits, expected, atol=1e-5)
    again = upper(tiny[model], name, MODELS[model])
    again.trainable.load(tmp_path)
    for tensor, other in zip(again.trainable.read().values(), method.trainable.read().values(), strict=True):
        assert torch.equal(tensor, other)


@pytest.mark.parametrize("name", ["adapter", "prefix memory"])
def test_a_folder_with_more_layers_is_refused(tiny: dict[str, str], tmp_path: Path, name: str) -> None:
    trained(tiny["bert"], name, "classification", first=0).trainable.save(tmp_path)
    with pytest.raises((RunError, ModelError), match=r"method\.first_layer"):
        upper(tiny["bert"], name, "classification").trainable.load(tmp_path)


def test_slots_by_length_are_as_many_in_each_layer(tiny: dict[str, str]) -> None:
    """The budget is that of the layers that are trained."""
    every, some = (upper(tiny["bert"], "prefix memory", "classification", first) for first in (0, 1))
    shapes = {name: tensor.shape for name, tensor in every.initialise().tensors.items()}
    assert {n: tensor.shape for n, tensor in some.initialise().tensors.items()}.items() < shapes.items()


@pytest.mark.parametrize(
    ("method", "more", "reason"),
    [
        ("soft_prompt", {}, "learnt vectors change what flows from the first layer on; leave it unset"),
        ("full", {}, "every weight is trained; leave it unset"),
        ("prefix", {"kind": "kv"}, "no exact form with kind = 'kv'"),
        ("adapter", {"first_layer": -1}, "greater than or equal to 0"),
    ],
)
def test_methods_that_have_no_lower_layers(method: str, more: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        registry.settings_of(method)(**{"first_layer": 1, **more})


@pytest.mark.parametrize("name", ["adapter", "prefix memory"])
def test_no_such_layer(tiny: dict[str, str], name: str) -> None:
    with pytest.raises(ModelError, match="the model has 2 layers; allowed: 0 to 2"):
        upper(tiny["bert"], name, "classification", first=5)
    with pytest.raises(ModelError, match="leaves nothing"):
        upper(tiny["bert"], name, "classification", first=2)


def test_unset_it_is_in_no_written_recipe(small: dict[str, Any]) -> None:
    assert "first_layer" not in str(fedcustom.Recipe.model_validate(small).model_dump(exclude_none=True))


def test_layers_that_give_more_than_states_are_computed(tmp_path: Path) -> None:
    """T5's first layer computes the biases by position of all layers: nothing is passed by."""
    torch.manual_seed(2)
    config = t.T5Config(
        vocab_size=400, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0,
        decoder_start_token_id=0, eos_token_id=2, dropout_rate=0.0,
    )  # fmt: skip
    t.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    method = upper(str(tmp_path), "lora", "generation", training={"batch_size": 3})
    assert method.local._lower is None
    assert all(update.loss > 0 for update in rounds(method, "generation", together=True)[1].values())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantised_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    path = wide_model(tmp_path, "llama")
    options: dict[str, Any] = {
        "model": {"quantization": scheme},
        "training": {"batch_size": 3, "optimizer": "sgd", "learning_rate": 0.1},
    }
    mine = rounds(
        method := upper(path, "prefix memory", "generation", **options), "generation", together=True
    )
    assert method.local._lower is not None
    assert method.local._lower.passed > 0
    monkeypatch.setattr(LocalTraining, "_lower", None)
    plain = rounds(upper(path, "prefix memory", "generation", **options), "generation", together=True)
    for one, other in zip(mine, plain, strict=True):
        assert all(distance(one[client], other[client]) < 1e-5 for client in one)


def test_a_resumed_run(small: dict[str, Any], tmp_path: Path) -> None:
    """What is kept of examples is computed anew after a stop."""
    small["method"] = {"name": "prefix", "length": 4, "first_layer": 1}
    small["rounds"] = {"count": 3, "checkpoint_every": 1}
    fedcustom.run(small, out=tmp_path / "whole")
    with pytest.raises(RuntimeError, match="stopped"):
        fedcustom.run(small, out=tmp_path / "half", callbacks=[StopAt(2)])
    fedcustom.run(small, out=tmp_path / "half", resume=True)
    whole, half = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "half")
    for name, tensor in whole.items():
        assert torch.allclose(tensor, half[name], atol=1e-5), name


def test_how_much_is_kept_is_said(tiny: dict[str, str]) -> None:
    remarks = upper(tiny["bert"], "prefix memory", "classification").remarks()
    assert any("layers below 1 are computed once for each example: 128 bytes a token" in r for r in remarks)
