"""The last layer of a decoder that classifies, computed for one token, against the plain model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as t

import fedcustom.models.load as loading
from fedcustom.methods.tuning.local_training import LocalTraining
from fedcustom.models import last_token
from fedcustom.models.first_token import classifying
from fedcustom.models.last_token import last_token_only
from helpers.methods import SETTINGS, classification_examples, make
from helpers.rounds import distance, rounds

SIZES: dict[str, Any] = {"num_labels": 3, "pad_token_id": 0, "vocab_size": 90}
LLAMA: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
KINDS: dict[str, Any] = {
    "gpt2": lambda: t.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **SIZES),
    "llama": lambda: t.LlamaConfig(**LLAMA, **SIZES),
    "llama eager": lambda: t.LlamaConfig(**LLAMA, **SIZES, attn_implementation="eager"),
    "gpt2 eager": lambda: t.GPT2Config(n_embd=32, n_layer=2, n_head=4, attn_implementation="eager", **SIZES),
    "mistral": lambda: t.MistralConfig(**LLAMA, **SIZES, sliding_window=4),
    "qwen2": lambda: t.Qwen2Config(**LLAMA, **SIZES),
    "qwen3": lambda: t.Qwen3Config(**LLAMA, **SIZES, head_dim=16),
}

METHODS = [
    "lora", "lora all", "prefix memory", "prefix shifts", "prefix", "adapter", "ia3", "bitfit", "ln_tuning",
    "soft_prompt", "full",
]  # fmt: skip


def classifier(kind: str) -> Any:
    torch.manual_seed(3)
    model = t.AutoModelForSequenceClassification.from_config(KINDS[kind]()).eval()
    for parameter in model.parameters():  # biases are zero at first, and the head is small
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def batch(case: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 90, (4, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    for row, length in enumerate((9, 3, 6, 1)):
        if case == "right":
            mask[row, length:] = 0
        elif case == "left":
            mask[row, : 9 - length] = 0
    if case == "inside":  # a text whose last tokens have the number of padding, and no mask
        ids[1, 7:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("case", ["right", "left", "whole", "inside"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_the_plain_models(kind: str, case: str) -> None:
    model = classifier(kind)
    inputs = batch(case)
    weights = torch.randn(4, 3, generator=torch.Generator().manual_seed(6))

    def found() -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        logits = model(**inputs).logits
        (logits * weights).sum().backward()
        return logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    logits, gradients = found()
    assert last_token_only(model)
    with classifying(inputs["input_ids"]):
        mine, own = found()
    assert torch.allclose(mine, logits, atol=1e-6)
    for one, other in zip(own, gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-5 * max(1.0, float(other.abs().max())))
    assert torch.equal(model(**inputs).logits, logits), "a pass whose states are wanted is the plain one"


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_fewer_tokens_are_computed(kind: str) -> None:
    model, rows = classifier(kind), list[int]()
    last = (model.transformer.h if kind == "gpt2" else model.model.layers)[-1]
    assert last_token_only(model)
    last.mlp.register_forward_hook(lambda _, __, output: rows.append(output.shape[:2].numel()))
    inputs = batch("right")
    model(**inputs)
    with classifying(inputs["input_ids"]):
        model(**inputs)
    assert rows == [36, 4]


def test_other_decoders_and_dropout_take_the_plain_path() -> None:
    phi = t.AutoModelForSequenceClassification.from_config(t.PhiConfig(**LLAMA, **SIZES)).eval()
    assert not last_token_only(phi)
    model = classifier("gpt2").train()
    assert last_token_only(model.eval())
    inputs = batch("right")
    model.train()
    torch.manual_seed(1)
    plain = model(**inputs).logits
    torch.manual_seed(1)
    with classifying(inputs["input_ids"]):
        assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "cohort"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_the_same_updates(
    tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch, model: str, name: str, together: bool
) -> None:
    linear = {"rank": 3, "target_modules": ["all-linear"]}
    settings = linear if name == "lora all" else SETTINGS[name]
    training = {
        "batch_size": 3, "optimizer": "sgd", "learning_rate": 0.1,
        "gradient_checkpointing": name == "lora all",
    }  # fmt: skip

    def updates() -> Any:
        method = make(tiny[model], name.split()[0], training=training, **settings)
        found = rounds(method, "classification", together=together, double=True)
        tokens = method.tokens(classification_examples(6))
        loss = method.objective.row_losses(method.trainable.model.eval(), method.objective.collate(tokens))
        return found, loss.detach(), method

    mine, losses, method = updates()
    forwards = [m.__dict__.get("forward") for m in method.base.model.modules()]
    assert any(getattr(forward, "func", None) is last_token._forward for forward in forwards)
    monkeypatch.setattr(loading, "last_token_only", lambda model: False)
    plain, expected, _ = updates()
    assert torch.allclose(losses, expected, atol=1e-6)
    for one, other in zip(mine, plain, strict=True):
        for client, update in one.items():
            assert distance(update, other[client]) < 1e-6


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_with_lower_layers_passed_by(
    tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    training = {"batch_size": 3, "optimizer": "sgd", "learning_rate": 0.1}

    def updates() -> Any:
        method = make(tiny[model], "prefix", training=training, length=8, first_layer=1)
        return rounds(method, "classification", together=True)

    mine = updates()
    monkeypatch.setattr(loading, "last_token_only", lambda model: False)
    monkeypatch.setattr(LocalTraining, "_lower", None)
    for one, other in zip(mine, updates(), strict=True):
        assert all(distance(one[client], other[client]) < 1e-5 for client in one)
