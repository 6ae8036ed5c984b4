"""FedSVD: what is sent is factored anew in each round; what the server keeps has one coordinate system."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fedcustom
from fedcustom.aggregation.settings import AggregationSettings
from fedcustom.core.errors import RecipeError
from fedcustom.core.tensors import Tensors, equal
from fedcustom.data.examples import ClientData
from fedcustom.federated.run_directory import Checkpoints
from fedcustom.methods import Answer, Client, State, WeightTuning, Work
from fedcustom.methods.lora.aggregation_hooks import LoraAggregation
from fedcustom.methods.tuning.server import released_tensors
from fedcustom.recipe.recipe import load_recipe
from helpers.methods import classification_examples, make
from helpers.runs import StopAt

SIZES = {"a": 3, "b": 8, "c": 5}
SHARES = {name: size / sum(SIZES.values()) for name, size in SIZES.items()}


def method_of(folder: str, **more: Any) -> WeightTuning:
    return make(folder, "lora", variant="fedsvd", **{"rank": 4, "target_modules": ["query"], **more})


def answers_of(method: WeightTuning, state: State, number: int) -> list[Answer]:
    found = []
    for name, size in SIZES.items():
        task = method.configure(state, number, {name: Work(epochs=2)})[name]
        update = method.execute(task, Client(name, ClientData(name, classification_examples(size))))
        method.check(task, update)
        found.append(Answer(name, task, update))
    return found


def hooks_of(method: WeightTuning) -> LoraAggregation:
    assert isinstance(method.hooks, LoraAggregation)
    return method.hooks


def products(method: WeightTuning, sent: Tensors) -> dict[str, Tensor]:
    """B A of each matrix as a client gets it."""
    return {m.name: sent[m.b_name].double() @ sent[m.a_name].double() for m in hooks_of(method).matrices}


def sent(method: WeightTuning, state: State) -> Tensors:
    return method.configure(state, 1, {"a": Work(epochs=1)})["a"].tensors


@pytest.mark.parametrize(("optimizer", "momentum"), [("fedavg", 0.0), ("fedavgm", 0.9), ("nesterov", 0.8)])
def test_sent_factors_and_momentum_on_the_product(
    tiny: dict[str, str], optimizer: str, momentum: float
) -> None:
    """In each round B A is what the optimiser makes of dense changes; A's rows are orthonormal, B's columns
    orthogonal, the longest first. An answer that is a round late counts in the coordinates that it was sent.
    """
    aggregation = AggregationSettings(
        server_optimizer=optimizer,  # type: ignore[arg-type]
        momentum=momentum or 0.9,
        server_learning_rate=0.7,
    )
    method = method_of(tiny["bert"], aggregation=aggregation)
    state = method.initialise()
    assert not any("lora_A" in name for name in state.tensors)
    first = sent(method, state)
    for matrix in hooks_of(method).matrices:  # B is zero: A is its orthonormal start
        torch.testing.assert_close(first[matrix.a_name], matrix.a, rtol=0, atol=1e-6)
    expected = {name: torch.zeros_like(p) for name, p in products(method, first).items()}
    moment = {name: torch.zeros_like(p) for name, p in expected.items()}
    late: list[Answer] = []
    for number in (1, 2, 3):
        answers = answers_of(method, state, number)
        before, taken = state, answers
        if late:
            taken = [late[0], *answers[1:]]
        late = [replace(answers[0], discount=0.5)]
        for matrix in hooks_of(method).matrices:
            change = sum(
                SHARES[a.client] * a.discount
                * a.update.tensors[matrix.b_name].double() @ a.task.tensors[matrix.a_name].double()
                for a in taken
            )  # fmt: skip
            assert isinstance(change, Tensor)
            moment[matrix.name] = momentum * moment[matrix.name] + change
            step = moment[matrix.name]
            if optimizer == "nesterov":
                step = change + momentum * step
            expected[matrix.name] = expected[matrix.name] + 0.7 * step
        state = method.aggregate(before, taken).state
        now = sent(method, state)
        for matrix in hooks_of(method).matrices:
            a, b = now[matrix.a_name].double(), now[matrix.b_name].double()
            torch.testing.assert_close(b @ a, expected[matrix.name], rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(a @ a.T, torch.eye(4).double(), rtol=0, atol=1e-6)
            lengths = (b.T @ b).diagonal()
            torch.testing.assert_close(b.T @ b, torch.diag(lengths), rtol=0, atol=1e-6 * float(lengths.max()))
            assert (lengths.diff() <= 0).all()
            torch.testing.assert_close(  # what is kept is the same change, by 1e-6 of its length
                state.tensors[matrix.b_name].double() @ matrix.a.double(), b @ a, rtol=0,
                atol=1e-6 * float(lengths.max().sqrt()),
            )  # fmt: skip
    assert all(float(p.norm()) > 1e-3 for p in expected.values())


@pytest.mark.parametrize(("optimizer", "same"), [("sgd", True), ("muon", True), ("adamw", False)])
def test_with_plain_gradient_steps_it_is_ffa_with_orthonormal_rows(
    tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch, optimizer: str, same: bool
) -> None:
    """The rows of A span the same in all rounds, and a gradient step of B in any orthonormal rows of that
    span is the same step of B A. Optimisers that divide each number by its own size see another one.
    """
    training = {"optimizer": optimizer, "learning_rate": 0.1, "clip_norm": 1.0, "momentum": 0.0}
    found = []
    for factored in (True, False):
        method = method_of(tiny["bert"], training=training)
        hooks = hooks_of(method)
        if not factored:
            a = {m.a_name: m.a for m in hooks.matrices}
            monkeypatch.setattr(hooks, "_factored_anew", lambda tensors, a=a: a)
        state = method.initialise()
        for number in (1, 2):
            state = method.aggregate(state, answers_of(method, state, number)).state
        found.append({m.name: state.tensors[m.b_name] for m in hooks.matrices})
    gaps = [float((one - found[1][name]).norm() / one.norm()) for name, one in found[0].items()]
    assert (max(gaps) < 1e-4) == same, gaps


def test_distances_for_robust_rules_are_those_of_the_product(tiny: dict[str, str]) -> None:
    method = method_of(tiny["bert"], alpha=6.0)
    state = method.aggregate(method.initialise(), answers_of(method, method.initialise(), 1)).state
    gathered, changes, dense = method.hooks.round(state), list[Tensors](), list[Tensor]()
    for answer in answers_of(method, state, 2):
        arrival = method.server._arrival(answer)
        changes.append({n: t for n, t in gathered.take(arrival).items() if "lora" in n})
        change, a = answer.update.tensors, answer.task.tensors
        parts = [change[m.b_name].double() @ a[m.a_name].double() for m in hooks_of(method).matrices]
        dense.append(torch.cat([part.ravel() for part in parts]))
    flat = torch.stack(dense) * (6.0 / 4)
    wanted = flat @ flat.T
    found = gathered.inner_products(changes)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.max()))


def test_factors_are_computed_once_for_a_cohort(tiny: dict[str, str]) -> None:
    method = method_of(tiny["bert"])
    tasks = method.configure(method.initialise(), 1, {name: Work(epochs=1) for name in SIZES})
    one, *others = (task.tensors for task in tasks.values())
    for matrix in hooks_of(method).matrices:
        assert all(other[matrix.a_name] is one[matrix.a_name] for other in others)


def test_a_rank_above_the_width_of_the_matrix(tiny: dict[str, str]) -> None:
    """Rows of A beyond it are zero, and stay so; the change is exact none the less."""
    method = method_of(tiny["bert"], rank=40)
    width = hooks_of(method).matrices[0].a.shape[1]
    assert width < 40
    state = method.initialise()
    for number in (1, 2):
        answers = answers_of(method, state, number)
        aggregate = method.aggregate(state, answers)
        state = aggregate.state
        assert aggregate.report["aggregation_error"] < 1e-5
        now = sent(method, state)
        for matrix in hooks_of(method).matrices:
            a = now[matrix.a_name].double()
            torch.testing.assert_close(a[:width] @ a[:width].T, torch.eye(width).double(), rtol=0, atol=1e-6)
            assert not a[width:].any()


def test_a_is_not_counted_among_what_is_trained(tiny: dict[str, str]) -> None:
    ours, fixed = (make(tiny["bert"], "lora", variant=variant, rank=4) for variant in ("fedsvd", "ffa"))
    assert ours.sizes(ours.initialise()) == fixed.sizes(fixed.initialise())
    released = [released_tensors(each.server.parts, each.trainable.forms()) for each in (ours, fixed)]
    assert released[0].keys() == released[1].keys(), "to which noise is added"


@pytest.mark.parametrize("correction", ["scaffold", "feddyn"])
def test_what_clients_would_remember_of_coordinates_is_refused(tiny: dict[str, str], correction: Any) -> None:
    training = {"optimizer": "sgd", "momentum": 0.0}
    with pytest.raises(RecipeError, match=rf"^aggregation.correction = '{correction}': .*variant fedsvd"):
        method_of(tiny["bert"], training=training, aggregation=AggregationSettings(correction=correction))


def test_other_refusals_name_their_key(small: dict[str, Any], tmp_path: Path) -> None:
    recipe = {**small, "method": {"name": "lora", "variant": "fedsvd", "rank": 2}}
    for values, message in (
        ({"compression.kind": "int8", "compression.down": True}, "compression.down: .*'fedsvd'"),
        (
            {"compression.kind": "int8", "compression.error_feedback": True},
            "compression.error_feedback: .*other tensors in each round",
        ),
        ({"method.client_ranks": [1, 2]}, "client_ranks = .*'fedsvd' needs one rank"),
        ({"method.dora": True}, "dora = true: .*'fedsvd'"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe(recipe, values)
    for keep in ("lora_B", "query"):
        with pytest.raises(RecipeError, match=r"^personalisation.keep = .*variant fedsvd.*allowed: head"):
            fedcustom.run({**recipe, "personalisation": {"keep": [keep]}}, out=tmp_path / keep)


PRIVATE: dict[str, dict[str, Any]] = {
    "client": {
        "aggregation": {"server_optimizer": "fedavgm"},
        "privacy": {"unit": "client", "noise_multiplier": 0.5},
    },
    "example": {
        "training": {"batch_size": 8, "learning_rate": 0.01, "local_steps": 2},
        "privacy": {"unit": "example", "noise_multiplier": 0.8},
    },
    "none": {"participation": {"buffer": 2, "latency": "lognormal"}},
}


@pytest.mark.parametrize("unit", list(PRIVATE))
def test_runs_go_on_bit_by_bit(small: dict[str, Any], tmp_path: Path, unit: str) -> None:
    """Private ones of either unit, and with late answers."""
    recipe = {
        **small,
        "method": {"name": "lora", "variant": "fedsvd", "rank": 2},
        "training": {"batch_size": 8, "learning_rate": 0.1},
        "rounds": {"count": 4, "clients_per_round": 2},
        "evaluation": {"batch_size": 32, "untuned": False},
        **PRIVATE[unit],
    }
    if "privacy" in recipe:
        recipe["privacy"] = {"delta": 1e-3, "randomness": "seeded", **recipe["privacy"]}
    whole = fedcustom.run(recipe, out=tmp_path / "whole")
    with pytest.raises(RuntimeError, match="stopped"):
        fedcustom.run(recipe, out=tmp_path / "parts", callbacks=[StopAt(2)])
    parts = fedcustom.run(recipe, out=tmp_path / "parts", resume=True)
    one, other = (Checkpoints(run.directory / "checkpoints").load(4).state for run in (whole, parts))
    assert equal(one.tensors, other.tensors)
    assert equal(one.server, other.server)
    assert any(bool(tensor.any()) for name, tensor in one.tensors.items() if "lora_B" in name)


def test_correlated_noise_takes_back_that_of_earlier_rounds(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gradient steps a private run ends as one whose factors are never made anew, with the same noise:
    it is drawn in coordinates that stay.
    """
    recipe = {
        **small,
        "method": {"name": "lora", "variant": "fedsvd", "rank": 2},
        "training": {"batch_size": 8, "learning_rate": 0.1},
        "rounds": {"count": 4, "clients_per_round": 2},
        "evaluation": {"batch_size": 32, "untuned": False},
        "privacy": {"unit": "client", "noise_multiplier": 0.5, "delta": 1e-3, "randomness": "seeded"},
    }
    ours = fedcustom.run(recipe, out=tmp_path / "ours")

    def kept(self: LoraAggregation, tensors: Tensors) -> Tensors:
        return {m.a_name: m.a for m in self.matrices}

    monkeypatch.setattr(LoraAggregation, "_factored_anew", kept)
    theirs = fedcustom.run(recipe, out=tmp_path / "theirs")
    one, other = (Checkpoints(run.directory / "checkpoints").load(4).state.tensors for run in (ours, theirs))
    for name, tensor in other.items():
        torch.testing.assert_close(one[name], tensor, rtol=1e-3, atol=1e-4 * float(tensor.abs().max()))


def test_secure_sums_give_the_plain_mean(small: dict[str, Any], tmp_path: Path) -> None:
    recipe = {
        **small,
        "method": {"name": "lora", "variant": "fedsvd", "rank": 2},
        "training": {"batch_size": 8, "fit_head": False, "optimizer": "sgd", "learning_rate": 0.1},
        "aggregation": {"weighting": "uniform"},
        "evaluation": {"batch_size": 32, "untuned": False},
    }
    plain = fedcustom.run(recipe, out=tmp_path / "plain")
    summed = fedcustom.run({**recipe, "secure_sum": {"on": True}}, out=tmp_path / "summed")
    ours, theirs = (
        Checkpoints(run.directory / "checkpoints").load(2).state.tensors for run in (summed, plain)
    )
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-4)
