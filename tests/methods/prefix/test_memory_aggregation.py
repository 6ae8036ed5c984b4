"""Merging variants of prefix memories through the verbs of the method, against functions written out here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu
from transformers.models.llama.modeling_llama import LlamaMLP

import fedcustom
from fedcustom.aggregation import robust
from fedcustom.aggregation.prefix_memory import probes
from fedcustom.aggregation.settings import AggregationSettings
from fedcustom.core.errors import ModelError, RecipeError
from fedcustom.core.tensors import Tensors
from fedcustom.data.examples import ClientData
from fedcustom.federated.norm_gate import NormGate
from fedcustom.methods import Answer, Client, State, WeightTuning, Work
from fedcustom.methods.prefix.memory_aggregation import ERROR_PROBES
from fedcustom.methods.tuning.aggregation_hooks import ClientDelta
from fedcustom.methods.tuning.messages import TrainUpdate
from fedcustom.recipe.recipe import load_recipe
from fedcustom.transport.protocol import Reply
from helpers.methods import MODELS, examples_for, make
from helpers.runs import rows_of

SIZES = {"a": 3, "b": 8, "c": 5}
ON_MODELS = pytest.mark.parametrize("model", ["bert", "llama"])


def memory(tiny: dict[str, str], model: str, **settings: Any) -> WeightTuning:
    return make(tiny[model], "prefix", MODELS[model], kind="memory", **{"length": 8, **settings})


def answers_of(method: WeightTuning, state: State, model: str, number: int = 1) -> list[Answer]:
    answers = []
    for name, size in SIZES.items():
        task = method.configure(state, number, {name: Work(epochs=2)})[name]
        update = method.execute(task, Client(name, ClientData(name, examples_for(MODELS[model])[:size])))
        method.check(task, update)
        answers.append(Answer(name, task, update))
    return answers


def filled(method: WeightTuning) -> State:
    """A state with values in it, as after some rounds."""
    generator = torch.Generator().manual_seed(5)
    start = method.initialise()
    return State({n: t + torch.randn(t.shape, generator=generator) for n, t in start.tensors.items()})


def after(state: State, answer: Answer) -> Tensors:
    return {n: t + answer.update.tensors.get(n, 0) for n, t in state.tensors.items()}


def added(method: WeightTuning, tensors: Tensors) -> Tensor:
    """What all blocks' memories add at the sample inputs, slot by slot; readers that do not travel are the
    model's.
    """
    own = {n: p.detach().cpu() for n, p in method.trainable.model.named_parameters()} | tensors
    found = []
    for name in own:
        if name.endswith(".slots.keys"):
            act = silu if ".self_attn." in name else gelu
            keys, values = own[name], own[name.replace("keys", "values")]
            x = probes(ERROR_PROBES, keys.shape[2], biased=False).float()
            for head in range(len(keys)):
                total = torch.zeros(ERROR_PROBES, values.shape[2])
                for key, value in zip(keys[head], values[head], strict=True):
                    total += act(x @ key / keys.shape[2] ** 0.5)[:, None] * value
                if (linear := name.replace("keys", "linear")) in own:
                    total += (x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()) @ own[linear][head]
                if (shifts := name.replace("keys", "shifts")) in own:
                    units = torch.stack([act(x @ key / keys.shape[2] ** 0.5) for key in keys[head]], 1)
                    total = torch.cat([total, units @ own[shifts][head]], 1)
                found.append(total.flatten())
        if name.endswith("intermediate.dense.adapter.weight"):
            x = probes(ERROR_PROBES, own[name].shape[1] + 1, biased=True).float()[:, :-1]
            units = gelu(x @ own[name].T + own[name.replace("weight", "bias")])
            found.append((units @ own[name.replace("intermediate", "output")].T).flatten())
        if name.endswith("gate_proj.adapter.weight"):
            x = probes(ERROR_PROBES, own[name].shape[1], biased=False).float()
            units = silu(x @ own[name].T) * (x @ own[name.replace("gate", "up")].T)
            found.append((units @ own[name.replace("gate", "down")].T).flatten())
    assert len(found) == 2 * 4 + 2
    return torch.cat(found).double()


def slots_of(method: WeightTuning) -> set[str]:
    return set(method.initialise().tensors) - method.trainable.head


@ON_MODELS
@pytest.mark.parametrize("shifts", [False, True])
@pytest.mark.parametrize("merging", ["mean", "matched", "stacked", "alternate", "frozen"])
def test_the_reported_error_is_the_distance_from_the_mean_of_functions(
    tiny: dict[str, str], model: str, merging: str, shifts: bool
) -> None:
    frozen: dict[str, Any] = {"keys": "frozen", "linear": True, "length": 16}
    settings = frozen if merging == "frozen" else {"merging": merging}
    method = memory(tiny, model, query_shifts=shifts, **settings)
    state = filled(method)
    for number in (1, 2):
        answers = answers_of(method, state, model, number)
        ideal = sum(a.update.weight * added(method, after(state, a)) for a in answers) / sum(SIZES.values())
        assert isinstance(ideal, Tensor)
        merged = method.aggregate(state, answers)
        state, error = merged.state, merged.report["aggregation_error"]
        missed = added(method, state.tensors) - ideal
        assert error == pytest.approx(float(missed.norm() / ideal.norm()), rel=1e-3, abs=1e-6)
        exact = merging == "frozen" or (merging == "alternate" and number == 2)
        assert (error < 1e-6) == exact


@ON_MODELS
def test_alternation_trains_readers_in_odd_rounds_and_writers_in_even_ones(
    tiny: dict[str, str], model: str
) -> None:
    method = memory(tiny, model, merging="alternate", linear=True, length=16, query_shifts=True)
    state = filled(method)
    writers = {
        name
        for name in slots_of(method)
        if any(part in name for part in ("values", "shifts", ".linear", "down_proj"))
    } | {name for name in slots_of(method) if "output.dense.adapter" in name}
    readers = slots_of(method) - writers
    assert all(any(part in n for part in ("keys", "intermediate", "gate", "up_proj")) for n in readers)
    for number, resting in ((1, writers), (2, readers), (3, writers)):
        answers = answers_of(method, state, model, number)
        came = set(answers[0].update.tensors)
        assert came == set(state.tensors) - resting
        following = method.aggregate(state, answers).state
        for name, tensor in state.tensors.items():
            assert torch.equal(following.tensors[name], tensor) == (name in resting), name
        state = following


def shuffled(method: WeightTuning, tensors: Tensors) -> Tensors:
    """The memory with the slots of every head and network in another order."""
    result, generator = dict(tensors), torch.Generator().manual_seed(3)
    for name in slots_of(method):
        if name.endswith(".keys"):
            parts = [name, name.replace("keys", "values"), name.replace("keys", "shifts")]
            parts = [other for other in parts if other in tensors]
            for other in parts:
                result[other] = torch.empty_like(tensors[other])
            for head in range(len(tensors[name])):
                order = torch.randperm(tensors[name].shape[1], generator=generator)
                for other in parts:
                    result[other][head] = tensors[other][head, order]
        if name.endswith(("intermediate.dense.adapter.weight", "gate_proj.adapter.weight")):
            order = torch.randperm(len(tensors[name]), generator=generator)
            for other in (name, name.replace("weight", "bias"), name.replace("gate", "up")):
                if other in tensors:
                    result[other] = tensors[other][order]
            out = name.replace("intermediate", "output").replace("gate", "down")
            result[out] = tensors[out][:, order]
    return result


@ON_MODELS
@pytest.mark.parametrize("shifts", [False, True])
def test_matching_does_not_see_the_order_of_a_clients_slots(
    tiny: dict[str, str], model: str, shifts: bool
) -> None:
    method = memory(tiny, model, merging="matched", length=16, query_shifts=shifts)
    state = filled(method)
    answers = answers_of(method, state, model)
    own = shuffled(method, after(state, answers[1]))
    torch.testing.assert_close(
        added(method, own), added(method, after(state, answers[1])), rtol=1e-6, atol=1e-5
    )
    change = {n: own[n] - state.tensors[n] for n in answers[1].update.tensors}
    assert any(not torch.allclose(change[n], answers[1].update.tensors[n]) for n in slots_of(method))
    turned = [answers[0], replace(answers[1], update=replace(answers[1].update, tensors=change)), answers[2]]
    merged, again = (method.aggregate(state, given).state.tensors for given in (answers, turned))
    for name, tensor in merged.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-4, atol=1e-5)
        # Clients that trained little kept their order, so that this is their plain mean.
        mean = sum(a.update.weight * a.update.tensors[name] for a in answers) / sum(SIZES.values())
        torch.testing.assert_close(tensor, state.tensors[name] + mean, rtol=1e-4, atol=1e-5)


@ON_MODELS
@pytest.mark.parametrize("shifts", [False, True])
def test_stacking_identical_clients_gives_their_function(
    tiny: dict[str, str], model: str, shifts: bool
) -> None:
    method = memory(tiny, model, merging="stacked", linear=True, length=16, query_shifts=shifts)
    state = filled(method)
    one = answers_of(method, state, model)[0]
    own = shuffled(method, after(state, one))
    change = {n: own[n] - state.tensors[n] for n in one.update.tensors}
    other = Answer("b", one.task, replace(one.update, tensors=change))
    merged = method.aggregate(state, [one, other])
    assert {n: t.shape for n, t in merged.state.tensors.items()} == {
        n: t.shape for n, t in state.tensors.items()
    }
    assert merged.report["aggregation_error"] < 1e-5
    torch.testing.assert_close(added(method, merged.state.tensors), added(method, own), rtol=1e-4, atol=1e-4)
    # In the order of the state that the round began with.
    for name, tensor in after(state, one).items():
        torch.testing.assert_close(merged.state.tensors[name], tensor, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("merging", ["mean", "matched", "stacked"])
def test_a_late_change_is_added_to_the_newest_state(tiny: dict[str, str], merging: str) -> None:
    method = memory(tiny, "bert", merging=merging)
    state = filled(method)
    answer = replace(answers_of(method, state, "bert")[0], discount=0.5)
    newest = State({n: t + 0.01 for n, t in state.tensors.items()})
    merged = method.aggregate(newest, [answer])
    for name, tensor in merged.state.tensors.items():
        expected = newest.tensors[name] + 0.5 * answer.update.tensors[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-3, atol=1e-4)
    assert merged.report["aggregation_error"] < 1e-5


def test_a_change_without_weight_does_not_count(tiny: dict[str, str]) -> None:
    """The server's own, of FLTrust."""
    method = memory(tiny, "bert")
    state = filled(method)
    gathered = method.hooks.round(state)
    answers = answers_of(method, state, "bert")
    root = TrainUpdate({n: t + 9 for n, t in state.tensors.items()}, 1.0, loss=1.0, examples=1, steps=1)
    for update, weight in [(root, 0.0), *((a.update, a.update.weight) for a in answers)]:
        delta = ClientDelta("x", state.tensors, update.tensors, weight, update)
        assert gathered.take(delta) is update.tensors
    _, report = gathered.merged(method.aggregate(state, answers).state.tensors)
    expected = method.aggregate(state, answers).report["aggregation_error"]
    assert report["aggregation_error"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "krum", "norm_bounding", "geometric_median"])
@pytest.mark.parametrize("merging", ["mean", "alternate"])
def test_robust_rules_see_every_tensor(tiny: dict[str, str], merging: str, rule: str) -> None:
    method = memory(
        tiny, "bert", merging=merging, aggregation=AggregationSettings(rule=rule, byzantine_fraction=0.3)
    )
    state = filled(method)
    answers = answers_of(method, state, "bert")
    hostile = {n: 1e3 * torch.ones_like(t) for n, t in answers[2].update.tensors.items()}
    answers[2] = replace(answers[2], update=replace(answers[2].update, tensors=hostile))
    merged = method.aggregate(state, answers)
    changes = [a.update.tensors for a in answers]
    if rule in ("median", "trimmed_mean"):
        expected = robust.coordinate_median(changes)  # of three, all but one are trimmed
        for name, change in expected.items():
            torch.testing.assert_close(merged.state.tensors[name], state.tensors[name] + change)
    most = max(float((merged.state.tensors[n] - state.tensors[n]).abs().max()) for n in hostile)
    assert most < 10
    assert "aggregation_error" in merged.report


def test_the_norm_gate_leaves_out_a_memory_that_is_far_too_large(tiny: dict[str, str]) -> None:
    method = memory(tiny, "bert")
    state = filled(method)
    replies = [
        Reply(a.client, a.task, a.update, "", "", 0, 0, 0.0) for a in answers_of(method, state, "bert")
    ]
    (first, *_), gate = replies, NormGate(AggregationSettings())
    large = {n: 1e4 * t if n in slots_of(method) else t for n, t in first.update.tensors.items()}
    bad = replace(first, client="d", update=replace(first.update, tensors=large))
    passed = {reply.client for reply in gate.passed([*replies, bad], {}) if reply.update is not None}
    assert passed == set(SIZES)


def test_parts_that_stay_with_the_clients(small: dict[str, Any], tmp_path: Path) -> None:
    """Of whose functions the server knows nothing."""
    kept = {"personalisation": {"keep": ["values"]}, "method": {"name": "prefix", "kind": "memory"}}
    run = fedcustom.run({**small, **kept}, out=tmp_path / "run")
    assert all("aggregation_error" not in row.get("method", {}) for row in rows_of(run.directory))
    for merging in ("matched", "stacked"):
        with pytest.raises(RecipeError, match=f"prefix merging {merging} merges all but the head"):
            fedcustom.run({**small, **kept}, {"method.merging": merging}, out=tmp_path / merging)


@pytest.mark.parametrize("merging", ["mean", "matched", "stacked", "alternate"])
def test_runs_report_the_error_of_every_round(small: dict[str, Any], tmp_path: Path, merging: str) -> None:
    recipe = {**small, "method": {"name": "prefix", "kind": "memory", "length": 8, "merging": merging}}
    run = fedcustom.run(recipe, {"training.fit_head": False}, out=tmp_path / "run")
    errors = [row["method"]["aggregation_error"] for row in rows_of(run.directory) if row["round"]]
    assert len(errors) == 2
    assert all(0 <= error < 2 for error in errors)
    if merging == "alternate":
        assert errors[1] < 1e-5
    assert fedcustom.load(tmp_path / "run").predict(["a cat"]) == run.predict(["a cat"])


def swapped(self: Any, x: Tensor) -> Tensor:
    result: Tensor = self.down_proj(self.gate_proj(x) * torch.relu(self.up_proj(x)))
    return result


def unheard_of(self: Any, x: Tensor) -> Tensor:
    result: Tensor = self.down_proj(torch.sin(3 * self.gate_proj(x)) * self.up_proj(x))
    return result


def test_how_networks_read_is_told_by_their_numbers(
    tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not by the names of matrices, or by the activation that the configuration names."""
    blocks = {model: memory(tiny, model).hooks.blocks for model in MODELS}  # type: ignore[attr-defined]
    gated = [b for b in blocks["llama"] if not b.heads]
    assert [tuple(n.split(".")[-3] for n in b.readers) for b in gated] == [("gate_proj", "up_proj")] * 2
    plain = [b for model in ("bert", "gpt2", "bart") for b in blocks[model] if not b.heads]
    assert len(plain) == 2 + 2 + 4
    assert all(len(b.readers) == len(b.biases) == 1 and b.reading is not None for b in plain)

    monkeypatch.setattr(LlamaMLP, "forward", swapped)
    other = [b for b in memory(tiny, "llama").hooks.blocks if not b.heads]  # type: ignore[attr-defined]
    assert [tuple(n.split(".")[-3] for n in b.readers) for b in other] == [("up_proj", "gate_proj")] * 2
    x = torch.tensor([-1.0, 2.0])
    assert all(torch.equal(b.reading.activation(x), torch.relu(x)) for b in other)

    monkeypatch.setattr(LlamaMLP, "forward", unheard_of)
    for merging in ("mean", "matched", "alternate"):
        method = memory(tiny, "llama", merging=merging)
        state = filled(method)
        assert not method.aggregate(state, answers_of(method, state, "llama")).report
    with pytest.raises(ModelError, match=r"merging = 'stacked' does not fit .* read their inputs; use"):
        memory(tiny, "llama", merging="stacked")
    assert memory(tiny, "llama", merging="stacked", feed_forward_slots=0).hooks.own_rule


@pytest.mark.parametrize(
    ("method", "overrides", "message"),
    [
        ({"kind": "kv", "merging": "alternate"}, {}, "'alternate': needs kind = 'memory'; kv allows mean"),
        *(
            ({"kind": "memory", "keys": "frozen", "merging": merging}, {}, f"merging = '{merging}': .* exact")
            for merging in ("matched", "stacked", "alternate")
        ),
        *(
            (
                {"kind": "memory", "slots": 0, "feed_forward_slots": 0, "linear": True, "merging": merging},
                {},
                "nothing but the linear memory",
            )
            for merging in ("matched", "stacked", "alternate")
        ),
        ({"kind": "memory", "merging": "sorted"}, {}, "merging"),
        (
            {"kind": "memory", "merging": "stacked", "compression": "cluster"},
            {},
            "compression = 'cluster': has no effect with kind = 'memory'",
        ),
        *(
            (
                {"kind": "memory", "merging": merging},
                {"participation.buffer": 2},
                f"method.merging = '{merging}' needs all at one state",
            )
            for merging in ("stacked", "alternate")
        ),
        (
            {"kind": "memory", "merging": "alternate"},
            {"training.fit_head": True},
            "method.merging = 'alternate' needs every round",
        ),
        (
            {"kind": "memory", "merging": "stacked"},
            {"compression.kind": "int8", "compression.down": True},
            "compression.down: does not go with method.merging = 'stacked'",
        ),
    ],
)
def test_bad_settings(method: dict[str, Any], overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe({"method": {"name": "prefix", **method}}, overrides)


@pytest.mark.parametrize("merging", ["mean", "matched"])
def test_what_keeps_the_order_of_slots_goes_with_late_answers(merging: str) -> None:
    method = {"name": "prefix", "kind": "memory", "merging": merging}
    recipe = load_recipe({"method": method}, {"participation.buffer": 2})
    assert recipe.method.replaces_rule is recipe.method.trains_every_round is None
    assert not recipe.method.redraws_tensors


@pytest.mark.parametrize("merging", ["matched", "stacked"])
def test_rules_of_their_own_admit_no_other(tiny: dict[str, str], merging: str) -> None:
    with pytest.raises(RecipeError, match=f"rule = 'krum': prefix merging {merging} is a rule of its own"):
        memory(tiny, "bert", merging=merging, aggregation=AggregationSettings(rule="krum"))
