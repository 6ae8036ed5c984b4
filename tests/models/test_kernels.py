"""Faster forms of the same functions."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.activations import ACT2FN

import fedcustom
from fedcustom.core.errors import ModelError
from fedcustom.data.examples import LearningTask
from fedcustom.models.first_token import first_token_only
from fedcustom.models.forward import classification_loss, target_losses
from fedcustom.models.kernels import fuse_activations
from fedcustom.models.load import load_base
from fedcustom.models.output import output_layer
from fedcustom.models.settings import ModelSettings
from helpers.plain import watched


def test_fused_activations_are_the_same_functions() -> None:
    states = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    for name in ("gelu_new", "gelu_fast"):
        model = torch.nn.Sequential(ACT2FN[name])
        expected = model(states)
        fuse_activations(model)
        assert isinstance(model[0], torch.nn.GELU)
        torch.testing.assert_close(model(states), expected, rtol=1e-6, atol=1e-8)


def test_attention_in_bfloat16_is_computed_in_float32(
    tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gradients, the numbers are those of the rounded inputs in float32; without, nothing is changed."""
    seen = []
    plain_attention = torch.nn.functional.scaled_dot_product_attention

    def recorded(query: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        seen.append((query.dtype, torch.is_autocast_enabled("cpu")))
        return plain_attention(query, *arguments, **options)

    base = load_base(ModelSettings(base=tiny["bert"]), LearningTask("classification", ("a", "b")), 0)
    attend = transformers.AttentionInterface()["sdpa"]
    generator = torch.Generator().manual_seed(0)
    shape = (2, 4, 7, 8)
    inputs = [torch.randn(shape, generator=generator).bfloat16().requires_grad_() for _ in range(3)]
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    with torch.autocast("cpu", torch.bfloat16):
        states, _ = attend(base.model, *inputs, None, is_causal=False)
        states.float().square().sum().backward()
        with torch.no_grad():
            attend(base.model, *inputs, None, is_causal=False)
    assert seen == [(torch.float32, False), (torch.bfloat16, True)]
    plain = [tensor.detach().float().requires_grad_() for tensor in inputs]
    weights = torch.softmax(plain[0] @ plain[1].transpose(2, 3) / 8**0.5, dim=-1)
    expected = (weights @ plain[2]).transpose(1, 2)
    expected.bfloat16().float().square().sum().backward()
    assert states.dtype == torch.bfloat16
    torch.testing.assert_close(states, expected.bfloat16(), rtol=0.01, atol=1e-6)
    for mine, theirs in zip(inputs, plain, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad.bfloat16(), rtol=0.02, atol=1e-3)


def test_a_loaded_model_gives_the_same_logits(tiny: dict[str, str]) -> None:
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny["gpt2"]).eval()
    base = load_base(ModelSettings(base=tiny["gpt2"]), LearningTask("generation"), 0)
    assert any(isinstance(module, torch.nn.GELU) for module in base.model.modules())
    ids = torch.arange(20).view(2, 10)
    torch.testing.assert_close(base.model(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-6)


SIZE = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CLASSIFIERS = {
    "bert": (transformers.BertConfig(**SIZE, intermediate_size=48), "bert.encoder.layer.1.intermediate"),
    "roberta": (
        transformers.RobertaConfig(**SIZE, intermediate_size=48),
        "roberta.encoder.layer.1.intermediate",
    ),
    "electra": (
        transformers.ElectraConfig(**SIZE, embedding_size=16, intermediate_size=48),
        "electra.encoder.layer.1.intermediate",
    ),
    "mpnet": (transformers.MPNetConfig(**SIZE, intermediate_size=48), "mpnet.encoder.layer.1.intermediate"),
    "distilbert": (
        transformers.DistilBertConfig(vocab_size=400, dim=32, n_layers=2, n_heads=4, hidden_dim=48),
        "distilbert.transformer.layer.1.ffn",
    ),
    "modernbert": (
        transformers.ModernBertConfig(**SIZE, intermediate_size=48, pad_token_id=0, classifier_pooling="cls"),
        "model.layers.1.mlp",
    ),
    "modernbert, mean": (
        transformers.ModernBertConfig(
            **SIZE, intermediate_size=48, pad_token_id=0, classifier_pooling="mean"
        ),
        "model.layers.1.mlp",
    ),
}


@pytest.mark.parametrize("kind", sorted(CLASSIFIERS))
def test_the_last_layer_is_computed_for_the_first_token(kind: str) -> None:
    configuration, feed_forward = CLASSIFIERS[kind]
    torch.manual_seed(3)
    plain = transformers.AutoModelForSequenceClassification.from_config(configuration).eval()
    model = copy.deepcopy(plain)
    by_first = kind != "modernbert, mean"
    assert first_token_only(model) == by_first

    ids = torch.randint(5, 400, (3, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 1])}
    batch["attention_mask"][1, 6:] = 0
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    seen = watched(model, feed_forward)
    loss = classification_loss(model, batch)
    expected = torch.nn.functional.cross_entropy(plain(**inputs).logits, batch["labels"])
    loss.backward()
    expected.backward()
    assert seen == [1 if by_first else 9]
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    gradients = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)

    # All other passes give all tokens.
    states = model.base_model(**inputs).last_hidden_state
    torch.testing.assert_close(states, plain.base_model(**inputs).last_hidden_state, rtol=1e-5, atol=1e-5)


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


IGNORE = -100


def batch_of_targets(seed: int = 0) -> dict[str, torch.Tensor]:
    """Three rows of which different parts are targets; the last row is padded."""
    ids = torch.randint(3, 400, (3, 10), generator=torch.Generator().manual_seed(seed))
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[0, :4], labels[1, :7], labels[2, :2] = IGNORE, IGNORE, IGNORE
    labels[2, 8:], mask[2, 8:] = IGNORE, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("virtual", [0, 4])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("chunk", [64, 2])
def test_losses_without_logits_are_those_of_the_logits(
    tiny: dict[str, str], kind: str, virtual: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients, against a row-by-row cross-entropy of the model's own logits."""
    monkeypatch.setattr("fedcustom.models.output.FEWEST_ROWS", chunk)
    monkeypatch.setattr("fedcustom.models.output.LOGIT_BYTES", {"cpu": 1})
    base = load_base(ModelSettings(base=tiny[kind]), LearningTask("generation"), 0)
    assert base.output is not None
    base.model.requires_grad_(False)
    if virtual:
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual)
        model = peft.get_peft_model(base.model, config)
    else:
        model = peft.get_peft_model(
            base.model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
        )
    model.eval()
    batch = batch_of_targets()
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = []
    for row in range(3):
        inputs = {k: batch[k][row : row + 1] for k in ("input_ids", "attention_mask")}
        logits = model(**inputs).logits[0, virtual:].double()
        chances = logits[:-1].log_softmax(1)
        target = batch["labels"][row, 1:]
        expected.append(-sum(chances[t, target[t]] for t in range(9) if target[t] != IGNORE))
    rows = torch.stack(expected)
    weights = torch.tensor([0.5, 2.0, 1.0])
    wanted = torch.autograd.grad((rows * weights).sum(), trained)

    losses, counts = target_losses(model, batch, sequence_to_sequence=False, output=base.output)
    assert base.output.serves(model)
    torch.testing.assert_close(losses.double(), rows, rtol=1e-5, atol=1e-5)
    assert counts.tolist() == [6, 3, 6]
    plain, _ = target_losses(model, batch, sequence_to_sequence=False)
    torch.testing.assert_close(plain, losses, rtol=1e-5, atol=1e-5)
    for one, other in zip(wanted, torch.autograd.grad((losses * weights).sum(), trained), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)
    with torch.inference_mode():
        again, _ = target_losses(model, batch, sequence_to_sequence=False, output=base.output)
    torch.testing.assert_close(again, losses.detach())
    assert model(input_ids=batch["input_ids"]).logits.shape[2] == 400  # other passes have logits as ever


def test_an_output_that_is_more_than_a_matrix_is_left_alone(tiny: dict[str, str]) -> None:
    bounded = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=16, head_dim=8, final_logit_softcapping=0.1, initializer_range=1.0,
        )
    )  # fmt: skip
    assert output_layer(bounded.eval()) is None
    base = load_base(ModelSettings(base=tiny["llama"]), LearningTask("generation"), 0)
    assert base.output is not None
    assert not base.output.serves(base.model)  # its matrix, the embedding's, is trained
    with torch.no_grad():
        assert base.output.serves(base.model)
    base.model.requires_grad_(False)
    assert base.output.serves(base.model)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"])
    assert not base.output.serves(peft.get_peft_model(base.model, config))
    bart = load_base(ModelSettings(base=tiny["bart"]), LearningTask("generation"), 0)
    assert bart.output is None


def test_a_copy_of_a_model_makes_its_own_passes(tiny: dict[str, str]) -> None:
    base = load_base(ModelSettings(base=tiny["gpt2"]), LearningTask("generation"), 0)
    assert base.output is not None
    ids = torch.arange(6)[None]
    copied = copy.deepcopy(base.model)
    torch.testing.assert_close(copied(ids).logits, base.model(ids).logits)
    with pytest.raises(ValueError, match="another way"):
        base.output.states(copied, input_ids=ids)
