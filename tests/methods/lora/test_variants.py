"""Every variant of LoRA through the verbs of the method, against the ideal merged weight."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fedcustom
from fedcustom.aggregation.settings import AggregationSettings
from fedcustom.core.errors import RecipeError
from fedcustom.core.tensors import Tensors, equal
from fedcustom.data.examples import ClientData
from fedcustom.federated.run_directory import Checkpoints
from fedcustom.methods import Answer, Client, WeightTuning, Work
from fedcustom.methods.lora.method import lora_layers
from fedcustom.methods.lora.settings import LoraSettings
from fedcustom.recipe.recipe import load_recipe
from helpers.methods import classification_examples, generation_examples, make

SIZES = {"a": 3, "b": 8, "c": 5}
EXACT = ("ffa", "rolora", "flora", "fedex", "fedsb", "fedsvd")
INEXACT = ("fedit", "flexlora", "hetlora")


def effective(method: WeightTuning) -> Tensors:
    """Every adapted matrix as the model now has it, in float64: base weight plus what the adapter adds."""
    merged = {}
    for name, layer in lora_layers(method.trainable.model).items():
        weight = layer.get_base_layer().weight.detach().double()
        outer = layer.lora_B["default"]
        b = outer.product() if hasattr(outer, "product") else outer.weight
        change = b.detach().double() @ layer.lora_A["default"].weight.detach().double()
        change = change * layer.scaling["default"]
        merged[name] = weight + (change.T if layer.fan_in_fan_out else change)
    return merged


def one_round(
    method: WeightTuning, kind: str, rounds: int = 2
) -> tuple[list[tuple[Tensors, Tensors]], list[float]]:
    """Rounds with three unequal clients: by round, the server's model and what it should have been."""
    state, pairs, errors = method.initialise(), [], []
    make_examples = classification_examples if kind == "classification" else generation_examples
    for number in range(1, rounds + 1):
        answers, ideal = [], {}
        for name, size in SIZES.items():
            task = method.configure(state, number, {name: Work(epochs=2)})[name]
            update = method.execute(task, Client(name, ClientData(name, make_examples(size))))
            method.check(task, update)
            answers.append(Answer(name, task, update))
            for matrix, weight in effective(method).items():  # the model is still the client's
                ideal[matrix] = ideal.get(matrix, 0) + weight * size / sum(SIZES.values())
        merged = method.aggregate(state, answers)
        state = merged.state
        errors.append(merged.report.get("aggregation_error"))
        method.trainable.write(method.ownership.complete(state.tensors))
        pairs.append((effective(method), ideal))
    return pairs, errors


def distance(pair: tuple[Tensors, Tensors], base: Tensors) -> float:
    """How far the merged weights are from the ideal, relative to the ideal change."""
    merged, ideal = pair
    missed = sum(float((merged[name] - ideal[name]).square().sum()) for name in ideal)
    wanted = sum(float((ideal[name] - base[name]).square().sum()) for name in ideal)
    return (missed / wanted) ** 0.5


@pytest.mark.parametrize(("model", "kind"), [("bert", "classification"), ("gpt2", "generation")])
@pytest.mark.parametrize("variant", EXACT)
def test_exact_variants_reach_the_ideal_weight(
    tiny: dict[str, str], model: str, kind: str, variant: str
) -> None:
    more: dict[str, Any] = {"client_ranks": [2, 3, 4]} if variant == "flora" else {}
    method = make(tiny[model], "lora", kind, variant=variant, rank=4, alpha=7.0, **more)
    pairs, errors = one_round(method, kind)
    for merged, ideal in pairs:
        for name, weight in ideal.items():
            torch.testing.assert_close(merged[name], weight, rtol=1e-5, atol=1e-6)
    assert max(errors) < 1e-5


@pytest.mark.parametrize("variant", INEXACT)
def test_the_reported_error_is_the_distance_from_the_ideal(tiny: dict[str, str], variant: str) -> None:
    more = {} if variant == "fedit" else {"client_ranks": [1, 2, 4]}
    method = make(tiny["bert"], "lora", variant=variant, rank=4, alpha=7.0, **more)
    base = {
        n: m.get_base_layer().weight.detach().double() for n, m in lora_layers(method.trainable.model).items()
    }
    pairs, errors = one_round(method, "classification")
    for pair, error in zip(pairs, errors, strict=True):
        assert error == pytest.approx(distance(pair, base), rel=1e-3)
    assert errors[-1] > 1e-6


def test_clients_train_at_their_own_rank_and_scale(tiny: dict[str, str]) -> None:
    """A client of rank 2 in a model of rank 4 takes the step of a plain model of rank 2."""
    settings: dict[str, Any] = {"alpha": 6.0, "target_modules": ["query"]}
    mixed = make(tiny["bert"], "lora", variant="hetlora", rank=4, client_ranks=[2], **settings)
    plain = make(tiny["bert"], "lora", rank=2, **settings)
    task = mixed.configure(mixed.initialise(), 1, {"a": Work(steps=3)})["a"]
    # B starts at zero, so the rescaling of a truncated B changes nothing here.
    same = plain.configure(plain.initialise(), 1, {"a": Work(steps=3)})["a"]
    for name in same.tensors:
        if "lora" in name:
            assert task.tensors[name].shape == same.tensors[name].shape
    same = replace(same, tensors=task.tensors)
    ours = mixed.execute(task, Client("a", ClientData("a", classification_examples())))
    theirs = plain.execute(same, Client("a", ClientData("a", classification_examples())))
    for name, tensor in theirs.tensors.items():
        torch.testing.assert_close(ours.tensors[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", ["fedit", "ffa", "rolora", "fedsa", "flora", "fedex", "fedsb", "fedsvd"])
def test_what_travels(tiny: dict[str, str], variant: str) -> None:
    method = make(tiny["bert"], "lora", variant=variant, rank=4)
    state = method.initialise()
    up = []
    for number in (1, 2):
        task = method.configure(state, number, {"a": Work(steps=1)})["a"]
        update = method.execute(task, Client("a", ClientData("a", classification_examples())))
        kinds = {name.split(".")[-2] for name in update.tensors if "lora" in name}
        up.append(kinds)
        assert not any(name.startswith("base_change/") for name in update.tensors)
    expected = {
        "ffa": [{"lora_B"}] * 2,
        "rolora": [{"lora_B"}, {"lora_A"}],
        "fedsa": [{"lora_A"}] * 2,
        "fedsb": [{"lora_R"}] * 2,
        "fedsvd": [{"lora_B"}] * 2,
    }.get(variant, [{"lora_A", "lora_B"}] * 2)
    assert up == expected


def test_fedsa_keeps_b_with_the_client(tiny: dict[str, str]) -> None:
    method = make(tiny["bert"], "lora", variant="fedsa", rank=4)
    client = Client("a", ClientData("a", classification_examples()))
    state = method.initialise()
    task = method.configure(state, 1, {"a": Work(epochs=3)})["a"]
    method.execute(task, client)
    kept = {n.removeprefix("state/"): t for n, t in client.memory.tensors.items()}
    assert kept
    assert all("lora_B" in name for name in kept)
    again = method.configure(state, 2, {"a": Work(epochs=1)})["a"]
    before = method.ownership.complete(again.tensors, client.memory)
    assert equal({n: before[n] for n in kept}, kept)


def test_a_private_adapter_beside_the_shared_one(small: dict[str, Any], tmp_path: Path) -> None:
    recipe = {**small, "method": {"name": "lora", "rank": 3, "private_rank": 2, "alpha": 6.0}}
    run = fedcustom.run(recipe, out=tmp_path / "run")
    plain = fedcustom.run({**small, "method": {"name": "lora", "rank": 3}}, out=tmp_path / "plain")
    sent = run.summary["bytes"]["up_per_client_round"]
    assert sent == pytest.approx(plain.summary["bytes"]["up_per_client_round"], rel=0.02)
    assert run.summary["personalised"]["client_mean"] != run.summary["client_mean"]
    # In the saved model, the private part adds nothing and the shared one has its scale.
    saved = json.loads((run.directory / "model" / "adapter_config.json").read_text())
    assert saved["r"] == 5
    assert saved["lora_alpha"] / saved["r"] == pytest.approx(2.0)
    state = Checkpoints(run.directory / "checkpoints").load(2).state.tensors
    private = {name for name in state if "_private" in name}
    assert len(private) == 2 * 2 * 2  # A and B of query and value in two layers
    assert not any(state[name].any() for name in private if "lora_B" in name)
    with pytest.raises(RecipeError, match="private_rank = 2: needs variant 'fedit'"):
        load_recipe(recipe, {"method.variant": "ffa"})


def test_dora_and_rank_stabilised_scaling(tiny: dict[str, str]) -> None:
    stable = make(tiny["bert"], "lora", rank=4, alpha=6.0, rank_stabilised=True)
    layer = next(iter(lora_layers(stable.trainable.model).values()))
    assert layer.scaling["default"] == pytest.approx(3.0)
    dora = make(tiny["bert"], "lora", rank=4, dora=True)
    assert any("magnitude" in name for name in dora.initialise().tensors)
    with pytest.raises(ValueError, match=r"DoRA's weight is not linear in B A.*allowed in fedit"):
        LoraSettings(variant="flora", dora=True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"method.client_ranks": [4, 8]}, "variant 'fedit' needs one rank for all; allowed in flora"),
        ({"method.variant": "flora", "method.client_ranks": [4, 9]}, "each must be from 1 to rank = 8"),
        (
            {"method.variant": "flora", "method.client_ranks": [4], "method.client_rank_shares": [1, 2]},
            "one number of at least 0 for each of client_ranks",
        ),
        ({"method.variant": "flor"}, "did you mean 'flora'"),
    ],
)
def test_bad_settings(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe({"method": {"name": "lora"}}, overrides)


def test_rules_of_their_own_admit_no_other(tiny: dict[str, str]) -> None:
    with pytest.raises(RecipeError, match=r"rule = 'krum': lora variant flora is a rule of its own"):
        make(tiny["bert"], "lora", variant="flora", aggregation=AggregationSettings(rule="krum"))


@pytest.mark.parametrize(
    "variant",
    ["ffa", "rolora", "fedsa", "flora", "fedex", "flexlora", "hetlora", "fedsb", "fedsvd", "fedask"],
)
def test_runs_export_and_reload(small: dict[str, Any], tmp_path: Path, variant: str) -> None:
    recipe = {**small, "method": {"name": "lora", "variant": variant, "rank": 4}}
    run = fedcustom.run(recipe, out=tmp_path / "run")
    texts = ["a cat", "the old dog near a small house"]
    before = [row["probability"] for row in run.predict(texts)]
    exported = run.export(tmp_path / "exported")
    assert exported is None or Path(exported).exists()
    again = fedcustom.load(tmp_path / "run")
    assert [row["probability"] for row in again.predict(texts)] == pytest.approx(before, abs=1e-6)
    model = run.model()
    inputs = run.tokenizer()(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        odds = torch.softmax(model(**inputs).logits, dim=-1).max(dim=-1).values
    if variant != "fedsa":
        assert odds.tolist() == pytest.approx(before, abs=1e-5)
