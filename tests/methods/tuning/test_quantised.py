"""Methods on a quantised base: gradients, cohorts, exports and refusals."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fedcustom
from fedcustom.core.errors import ExportError, RecipeError
from fedcustom.core.files import read_json
from fedcustom.federated.callbacks import Callback
from fedcustom.federated.resources import measure_resources
from fedcustom.methods import WeightTuning
from fedcustom.methods.tuning import technique
from fedcustom.methods.tuning.export_check import check_export
from fedcustom.models import quantised_layers as layers
from fedcustom.models.load import Base
from fedcustom.models.quantised_layers import quantised_layers
from fedcustom.recipe.recipe import load_recipe
from helpers.methods import SETTINGS, examples_for, make
from helpers.quantised import SCHEMES, wide_model
from helpers.rounds import distance, rounds

TRAINING = {"batch_size": 3, "clip_norm": 1.0, "optimizer": "sgd", "learning_rate": 0.1}

NAMES = [
    "lora", "lora dora", "lora fedsb", "lora flexlora", "prefix memory", "prefix", "adapter", "ia3", "bitfit",
    "ln_tuning", "soft_prompt",
]  # fmt: skip

KINDS = {"llama": "generation", "bert": "classification"}

INT8 = SCHEMES[:1]


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {kind: wide_model(tmp_path_factory.mktemp("wide") / kind, kind) for kind in KINDS}


def made(folder: str, name: str, kind: str, scheme: str | None, **training: Any) -> WeightTuning:
    model = {"quantization": scheme}
    settings = SETTINGS[name]
    return make(folder, name.split()[0], kind, model=model, training={**TRAINING, **training}, **settings)


def dequantised(model: Any) -> None:
    """Plain layers with the rounded weights in the place of quantised ones."""
    for layer in quantised_layers(model):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)
        plain.bias = layer.bias
        model.set_submodule(layer.place, plain)


@pytest.mark.parametrize("model", list(KINDS))
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", NAMES)
def test_updates_are_those_of_a_plain_model_with_the_rounded_weights(
    wide: dict[str, str], monkeypatch: pytest.MonkeyPatch, name: str, scheme: str, model: str
) -> None:
    """Alone and in a cohort. The products are the same, so that only sums in another order differ."""
    kind, folder = KINDS[model], wide[model]
    quantised = made(folder, name, kind, scheme)
    assert quantised_layers(quantised.base.model)
    found = [
        rounds(method, kind, together=together)
        for method, together in ((quantised, False), (made(folder, name, kind, scheme), True))
    ]
    load = technique.Base  # the class, to find it where methods load it

    def plain(*arguments: Any, **options: Any) -> Base:
        base: Base = original(*arguments, **options)
        assert isinstance(base, load)
        dequantised(base.model)
        return base

    from helpers import methods

    original = methods.load_base
    monkeypatch.setattr(methods, "load_base", plain)
    copy = made(folder, name, kind, scheme)
    assert not quantised_layers(copy.base.model)
    expected = rounds(copy, kind, together=False)
    for each in found:
        for before, after in zip(expected, each, strict=True):
            for client, update in before.items():
                assert distance(update, after[client]) < 1e-4, client
                assert update.loss == pytest.approx(after[client].loss, rel=1e-5)


@pytest.mark.parametrize("name", ["lora", "prefix memory", "bitfit", "adapter"])
@pytest.mark.parametrize("scheme", INT8)
def test_a_cohort_shares_the_quantised_base(wide: dict[str, str], name: str, scheme: str) -> None:
    assert made(wide["llama"], name, "generation", scheme).widest_cohort() > 1


@pytest.mark.parametrize("scheme", INT8)
def test_checkpointing_gives_the_same(wide: dict[str, str], scheme: str) -> None:
    kept, again = (
        rounds(
            made(wide["llama"], "lora", "generation", scheme, gradient_checkpointing=switched),
            "generation",
            together=True,
        )
        for switched in (False, True)
    )
    for before, after in zip(kept, again, strict=True):
        assert all(distance(update, after[client]) < 1e-6 for client, update in before.items())


@pytest.mark.parametrize("scheme", INT8)
@pytest.mark.parametrize(
    ("name", "model"),
    [("lora", "llama"), ("prefix memory", "llama"), ("adapter", "bert"), ("bitfit", "bert")],
)
def test_an_export_loads_on_the_exact_base(
    wide: dict[str, str], tmp_path: Path, name: str, model: str, scheme: str
) -> None:
    """With transformers and peft alone, and the outputs of the exact base with what was trained."""
    kind = KINDS[model]
    method = made(wide[model], name, kind, scheme)
    rounds(method, kind, together=True)
    state = method.initialise()
    moved = {n: t + 0.05 * torch.randn_like(t) for n, t in state.tensors.items()}
    state = replace(state, tensors=moved)
    examples = examples_for(kind)[:2]
    expected = method.reference(state, examples)
    method.export(state, tmp_path / "model")
    assert check_export(tmp_path / "model", expected) == ""
    assert quantised_layers(method.base.model)
    opened = method.open(tmp_path / "model")
    for key, tensor in state.tensors.items():
        torch.testing.assert_close(opened.tensors[key], tensor)


@pytest.mark.parametrize("scheme", INT8)
def test_an_export_without_memory_for_exact_weights_is_refused(
    wide: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    method = made(wide["bert"], "adapter", "classification", scheme)
    monkeypatch.setattr(layers, "free_memory", lambda device: 1000)
    with pytest.raises(
        ExportError, match=r"quantised in int8.* take 0\.0 GB, and 0\.0 GB of memory are free"
    ):
        method.export(method.initialise(), tmp_path / "model")
    lora = made(wide["llama"], "lora", "generation", scheme)
    lora.export(lora.initialise(), tmp_path / "adapter")  # which needs none of them
    assert (tmp_path / "adapter" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("method", "setting"),
    [
        ({"name": "full"}, r"method\.name = 'full'"),
        ({"name": "lora", "variant": "flora"}, r"method\.variant = 'flora'"),
        ({"name": "lora", "variant": "fedex"}, r"method\.variant = 'fedex'"),
        ({"name": "distillation"}, r"method\.client_method = 'full'"),
        ({"name": "distillation", "client_method": "lora"}, r"method\.server_method = 'full'"),
    ],
)
def test_methods_that_change_the_base_are_refused(
    generation: dict[str, Any], method: dict[str, Any], setting: str
) -> None:
    generation["method"] = method
    generation["model"]["quantization"] = "nf4"
    with pytest.raises(RecipeError, match=rf"model\.quantization = 'nf4': {setting} changes the matrices"):
        load_recipe(generation)


class Notes(Callback):
    """What a run says."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_note(self, text: str) -> None:
        self.texts.append(text)


@pytest.mark.parametrize("scheme", INT8)
def test_a_run_says_what_is_quantised(
    wide: dict[str, str], generation: dict[str, Any], tmp_path: Path, scheme: str
) -> None:
    generation["model"] = {"base": wide["llama"], "quantization": scheme}
    generation["method"] = {"name": "lora", "rank": 2}
    notes = Notes()
    run = fedcustom.run(generation, out=tmp_path / "run", callbacks=[notes])
    words = "14 of 14 matrices in int8"
    assert any(words in text for text in notes.texts)
    assert words in read_json(tmp_path / "run" / "environment.json")["quantised"]
    assert quantised_layers(run.model())
    assert run.predict(["a b"])
    page = (tmp_path / "run" / "model" / "README.md").read_text(encoding="utf-8")
    assert "stored in int8 while this was trained" in page
    run.export(tmp_path / "exported")


@pytest.mark.parametrize("scheme", INT8)
def test_an_estimate_counts_what_is_stored(
    wide: dict[str, str], generation: dict[str, Any], scheme: str
) -> None:
    generation["method"] = {"name": "lora", "rank": 2}
    generation["model"] = {"base": wide["llama"]}
    exact = measure_resources(load_recipe(generation))
    quantised = measure_resources(load_recipe(generation, {"model.quantization": scheme}))
    assert quantised.parameters == exact.parameters
    packed = quantised_layers(made(wide["llama"], "lora", "generation", scheme).base.model)
    saved = sum(3 * m.in_features * m.out_features - 4 * m.out_features for m in packed)
    assert exact.model_bytes - quantised.model_bytes == saved


def test_the_digest_of_recipes_without_it_is_the_same(generation: dict[str, Any]) -> None:
    from fedcustom.experiment.grid import digest

    plain = load_recipe(generation)
    assert digest(plain) == digest(load_recipe({**generation}))
    if importlib.util.find_spec("torchao"):
        assert digest(plain) != digest(load_recipe(generation, {"model.quantization": "int8"}))
