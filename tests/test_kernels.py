"""Faster forms of the same functions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.activations import ACT2FN

import fedcustom
from fedcustom.data.examples import LearningTask
from fedcustom.errors import ModelError
from fedcustom.models.kernels import fuse_activations
from fedcustom.models.load import faster, load_base
from fedcustom.models.settings import ModelSettings


def test_fused_activations_are_the_same_functions() -> None:
    states = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    for name in ("gelu_new", "gelu_fast"):
        model = torch.nn.Sequential(ACT2FN[name])
        expected = model(states)
        fuse_activations(model)
        assert isinstance(model[0], torch.nn.GELU)
        torch.testing.assert_close(model(states), expected, rtol=1e-6, atol=1e-8)


def test_a_loaded_model_gives_the_same_logits(tiny: dict[str, str]) -> None:
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny["gpt2"]).eval()
    base = load_base(ModelSettings(base=tiny["gpt2"]), LearningTask("generation"), 0)
    assert any(isinstance(module, torch.nn.GELU) for module in base.model.modules())
    ids = torch.arange(20).view(2, 10)
    torch.testing.assert_close(base.model(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "bart"])
def test_auto_measures_a_step_in_each_precision(tiny: dict[str, str], kind: str) -> None:
    task = LearningTask("classification", ("a", "b")) if kind == "bert" else LearningTask("generation")
    base = load_base(ModelSettings(base=tiny[kind], dtype="auto"), task, 0)
    assert set(base.measured) == {"float32", "bfloat16"}
    assert all(seconds > 0 for seconds in base.measured.values())
    assert base.precision == faster(base.measured)
    assert all(p.grad is None and p.dtype == torch.float32 for p in base.model.parameters())
    assert not load_base(ModelSettings(base=tiny[kind]), task, 0).measured


def test_bfloat16_must_win_clearly() -> None:
    assert faster({"float32": 1.0, "bfloat16": 0.79}) == "bfloat16"
    assert faster({"float32": 1.0, "bfloat16": 0.81}) == "float32"


@pytest.mark.slow
def test_a_compiled_model_trains_the_same(tiny: dict[str, str], data_folder: Path, tmp_path: Path) -> None:
    recipe = {
        "model": {"base": tiny["bert"]},
        "data": {"source": str(data_folder), "test": "test", "max_length": 24},
        "clients": {"partition": "iid", "count": 2},
        "method": {"name": "lora"},
        "training": {"batch_size": 8, "local_steps": 2, "optimizer": "sgd", "learning_rate": 0.1},
        "rounds": {"count": 1},
        "evaluation": {"untuned": False},
    }
    final = []
    for name in ("plain", "compiled"):
        recipe["model"] = {"base": tiny["bert"], "compile": name == "compiled"}
        fedcustom.run(recipe, out=tmp_path / name)
        final.append(load_file(tmp_path / name / "model" / "adapter_model.safetensors"))
    for key, tensor in final[0].items():
        torch.testing.assert_close(final[1][key], tensor, rtol=1e-4, atol=1e-6)


def test_compiling_without_a_compiler_is_refused(
    tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ModelError, match="needs a C\\+\\+ compiler"):
        load_base(ModelSettings(base=tiny["bert"], compile=True), LearningTask("retrieval"), 0, head=False)
