"""Training upper layers with what the lower ones give computed once, against computing it every time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as t

from fedcustom.core.errors import ModelError
from fedcustom.methods import WeightTuning
from fedcustom.methods.tuning.local_training import LocalTraining
from fedcustom.methods.tuning.messages import TrainUpdate
from fedcustom.models.frozen_layers import (
    LowerLayers,
    in_upper_layers,
    layer_of,
    lowest_stack,
    transformer_layers,
)
from helpers.methods import MODELS, SETTINGS, make
from helpers.rounds import distance, rounds

TRAINING = {"batch_size": 3, "optimizer": "sgd", "learning_rate": 0.1}

UPPER = ["lora", "bitfit", "ia3", "ln_tuning", "adapter", "prefix memory"]
"""A variant of each method that can be kept to upper layers."""

VARIANTS = [n for n in SETTINGS if n.split()[0] == "lora" or n in ("prefix shifts", "prefix frozen")]
VARIANTS += [n for n in SETTINGS if n.startswith("prefix memory ")]


def upper(path: str, name: str, kind: str = "classification", first: int = 1, **more: Any) -> WeightTuning:
    """A method with its small settings, kept to the layers from the second on."""
    settings = {**SETTINGS[name], **more, "first_layer": first}
    return make(path, name.split()[0], kind, **settings)


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "cohort"])
@pytest.mark.parametrize("technique", UPPER)
@pytest.mark.parametrize("model", MODELS)
def test_the_same_updates_and_fewer_layers(
    tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch, model: str, technique: str, together: bool
) -> None:
    kind = MODELS[model]
    method = upper(tiny[model], technique, kind, training=TRAINING)
    _, layers = lowest_stack(method.trainable.model) or ("", torch.nn.ModuleList())
    computed = [0, 0]
    next(layers[0].children()).register_forward_hook(count_into(computed, 0))
    layers[1].register_forward_hook(count_into(computed, 1))
    with_cache = rounds(method, kind, together=together)
    assert computed[0] < computed[1] / 2
    lower = method.local._lower
    assert isinstance(lower, LowerLayers)
    assert lower.passed > 0

    monkeypatch.setattr(LocalTraining, "_lower", None)
    without = rounds(upper(tiny[model], technique, kind, training=TRAINING), kind, together=together)
    same(with_cache, without)


def same(one: list[dict[str, TrainUpdate]], other: list[dict[str, TrainUpdate]]) -> None:
    """Whether all updates agree to 1e-5."""
    for mine, its in zip(one, other, strict=True):
        for client, update in mine.items():
            assert distance(update, its[client]) < 1e-5
            assert update.loss == pytest.approx(its[client].loss, rel=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant(tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Clients in one batch with the cache, against each alone without it."""
    method = upper(tiny["bert"], name, training=TRAINING)
    mine = rounds(method, "classification", together=True)
    assert method.local._lower is not None
    assert method.local._lower.passed > 0
    monkeypatch.setattr(LocalTraining, "_lower", None)
    same(mine, rounds(upper(tiny["bert"], name, training=TRAINING), "classification", together=False))


@pytest.mark.parametrize("more", [{"gradient_checkpointing": True}, {"optimizer": "adamw"}], ids=str)
@pytest.mark.parametrize("technique", ["lora", "prefix memory"])
@pytest.mark.parametrize("model", ["bert", "llama", "bart"])
def test_with_checkpointing_and_moments(
    tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch, model: str, technique: str, more: dict[str, Any]
) -> None:
    training, kind = TRAINING | {"learning_rate": 0.01} | more, MODELS[model]
    method = upper(tiny[model], technique, kind, training=training)
    mine = rounds(method, kind, together=True)
    assert method.local._lower is not None
    assert method.local._lower.passed > 0
    monkeypatch.setattr(LocalTraining, "_lower", None)
    plain = upper(tiny[model], technique, kind, training=training | {"gradient_checkpointing": False})
    same(mine, rounds(plain, kind, together=True))


def count_into(computed: list[int], place: int) -> Any:
    def hook(layer: torch.nn.Module, arguments: Any, result: Any) -> None:
        computed[place] += 1

    return hook


@pytest.mark.parametrize("technique", UPPER)
def test_only_upper_layers_and_the_head_travel(tiny: dict[str, str], technique: str) -> None:
    method = upper(tiny["bert"], technique)
    names = set(method.initialise().tensors)
    stack, _ = transformer_layers(method.base.model) or ("", [])
    numbers = {layer_of(name, stack) for name in names - method.trainable.head}
    assert numbers == {1}
    every = set(upper(tiny["bert"], technique, first=0).initialise().tensors)
    assert names < every
    assert {n for n in every if layer_of(n, stack) == 1} | method.trainable.head == names


def test_the_head_alone(tiny: dict[str, str]) -> None:
    method = make(tiny["bert"], "bitfit", "classification", first_layer=2, training=TRAINING)
    assert set(method.initialise().tensors) == method.trainable.head
    rounds(method, "classification", together=True)
    assert method.local._lower is not None
    assert method.local._lower.passed > 0


def test_evaluation_computes_every_layer(tiny: dict[str, str]) -> None:
    """After training, a forward pass of other examples is the plain model's."""
    method = make(tiny["bert"], "lora", "classification", first_layer=1, training=TRAINING)
    rounds(method, "classification", together=False)
    ids = torch.randint(5, 300, (4, 7))
    with torch.no_grad():
        mine = method.trainable.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        plain = make(tiny["bert"], "lora", "classification", first_layer=1, training=TRAINING)
        plain.trainable.write(method.trainable.read())
        other = plain.trainable.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert torch.equal(mine, other)


def test_no_more_is_kept_than_there_is_room_for(tiny: dict[str, str]) -> None:
    method = make(tiny["bert"], "lora", "classification", first_layer=1, training=TRAINING)
    reference = make(tiny["bert"], "lora", "classification", first_layer=1, training=TRAINING)
    lower = method.local._lower
    assert lower is not None
    lower.room = 3000
    mine, other = (rounds(m, "classification", together=False) for m in (method, reference))
    kept = sum(states.numel() * states.element_size() for _, states in lower.kept.values())
    assert 0 < kept <= 3000
    assert kept + lower.room == 3000
    for one, two in zip(mine, other, strict=True):
        assert all(distance(one[client], two[client]) < 1e-5 for client in one)


@pytest.mark.parametrize(
    ("model", "technique", "first", "reason"),
    [
        ("bert", "lora", 3, "the model has 2 layers; allowed: 0 to 2"),
        ("bert", "lora", 2, "leaves nothing"),
        ("llama", "bitfit", 9, "the model has 2 layers"),
        ("bart", "lora", 3, "the model's encoder has 2 layers; allowed: 0 to 2"),
    ],
)
def test_what_does_not_fit_is_refused(
    tiny: dict[str, str], model: str, technique: str, first: int, reason: str
) -> None:
    kind = "generation" if model == "bart" else "classification"
    with pytest.raises(ModelError, match=reason):
        make(tiny[model], technique, kind, first_layer=first)


def test_a_decoder_alone(tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an encoder-decoder all of whose encoder is left as it is."""
    method = upper(tiny["bart"], "lora", "generation", first=2, training=TRAINING)
    assert {name.split(".")[1] for name in method.initialise().tensors} == {"decoder"}
    mine = rounds(method, "generation", together=True)
    assert method.local._lower is not None
    assert method.local._lower.passed > 0
    monkeypatch.setattr(LocalTraining, "_lower", None)
    plain = upper(tiny["bart"], "lora", "generation", first=2, training=TRAINING)
    same(mine, rounds(plain, "generation", together=True))


def test_a_model_without_a_stack() -> None:
    """ALBERT's one layer is all of its layers."""
    config = t.AlbertConfig(
        vocab_size=40, embedding_size=8, hidden_size=8, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=8,
    )  # fmt: skip
    with pytest.raises(ValueError, match="no single stack of layers; leave it at 0"):
        in_upper_layers(t.AlbertModel(config), {"encoder"}, 1)


def test_nothing_is_passed_by_where_the_first_layer_is_trained(tiny: dict[str, str]) -> None:
    for technique in ("lora", "prefix", "full"):
        assert make(tiny["bert"], technique, "classification").local._lower is None
