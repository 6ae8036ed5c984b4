"""Training upper layers with what the lower ones give computed once, against computing it every time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedcustom.core.errors import ModelError
from fedcustom.methods.tuning.local_training import LocalTraining
from fedcustom.models.frozen_layers import LowerLayers, layer_of, transformer_layers
from helpers.methods import MODELS, make
from helpers.rounds import distance, rounds

ONE_STACK = [name for name, kind in MODELS.items() if "bart" not in name]
TRAINING = {"batch_size": 3, "optimizer": "sgd", "learning_rate": 0.1}


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "cohort"])
@pytest.mark.parametrize("technique", ["lora", "bitfit", "ia3"])
@pytest.mark.parametrize("model", ONE_STACK)
def test_the_same_updates_and_fewer_layers(
    tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch, model: str, technique: str, together: bool
) -> None:
    kind, options = MODELS[model], {"first_layer": 1, "training": TRAINING}
    method = make(tiny[model], technique, kind, **options)
    _, layers = transformer_layers(method.trainable.model) or ("", torch.nn.ModuleList())
    computed = [0, 0]
    next(layers[0].children()).register_forward_hook(count_into(computed, 0))
    layers[1].register_forward_hook(count_into(computed, 1))
    with_cache = rounds(method, kind, together=together)
    assert computed[0] < computed[1] / 2
    lower = method.local._lower
    assert isinstance(lower, LowerLayers)
    assert lower.passed > 0

    monkeypatch.setattr(LocalTraining, "_lower", None)
    without = rounds(make(tiny[model], technique, kind, **options), kind, together=together)
    for mine, other in zip(with_cache, without, strict=True):
        for client, update in mine.items():
            assert distance(update, other[client]) < 1e-5
            assert update.loss == pytest.approx(other[client].loss, rel=1e-5)


def count_into(computed: list[int], place: int) -> Any:
    def hook(layer: torch.nn.Module, arguments: Any, result: Any) -> None:
        computed[place] += 1

    return hook


@pytest.mark.parametrize("technique", ["lora", "bitfit", "ia3"])
def test_only_upper_layers_and_the_head_travel(tiny: dict[str, str], technique: str) -> None:
    method = make(tiny["bert"], technique, "classification", first_layer=1)
    names = set(method.initialise().tensors)
    stack, _ = transformer_layers(method.base.model) or ("", [])
    numbers = {layer_of(name, stack) for name in names - method.trainable.head}
    assert numbers == {1}
    every = set(make(tiny["bert"], technique, "classification").initialise().tensors)
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
        ("bart", "lora", 1, "no single stack of layers"),
    ],
)
def test_what_does_not_fit_is_refused(
    tiny: dict[str, str], model: str, technique: str, first: int, reason: str
) -> None:
    kind = "generation" if model == "bart" else "classification"
    with pytest.raises(ModelError, match=reason):
        make(tiny[model], technique, kind, first_layer=first)


def test_nothing_is_passed_by_where_the_first_layer_is_trained(tiny: dict[str, str]) -> None:
    for technique in ("lora", "prefix", "full"):
        assert make(tiny["bert"], technique, "classification").local._lower is None
