"""FedASK: two exchanges a round give the best approximation of the mean of clients' products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fedcustom
from fedcustom.core.errors import AggregationError, RecipeError, UpdateError
from fedcustom.core.tensors import Tensors, equal
from fedcustom.data.examples import ClientData
from fedcustom.federated.run_directory import Checkpoints
from fedcustom.methods import UNFINISHED, Aggregate, Answer, Client, State, WeightTuning, Work
from fedcustom.methods.lora.aggregation_hooks import LoraAggregation
from fedcustom.methods.lora.messages import ProjectionUpdate, ProjectTask
from fedcustom.methods.lora.sketch_exchange import BASIS, FACTORS, FACTORS_ROUND, SKETCH, SketchExchange
from fedcustom.methods.tuning.messages import TrainTask
from fedcustom.recipe.recipe import load_recipe
from helpers.methods import classification_examples, generation_examples, make
from helpers.runs import StopAt, rows_of, without_seconds

SIZES = {"a": 3, "b": 8, "c": 5}


def method_of(folder: str, kind: str = "classification", **more: Any) -> WeightTuning:
    return make(folder, "lora", kind, variant="fedask", **{"rank": 4, "alpha": 7.0, **more})


def clients_of(kind: str = "classification") -> dict[str, Client]:
    made = classification_examples if kind == "classification" else generation_examples
    return {name: Client(name, ClientData(name, made(size))) for name, size in SIZES.items()}


def hooks_of(method: WeightTuning) -> LoraAggregation:
    assert isinstance(method.hooks, LoraAggregation)
    return method.hooks


def products(method: WeightTuning, tensors: Mapping[str, Tensor]) -> Tensors:
    """B A of each matrix."""
    return {
        m.name: tensors[m.b_name].double() @ tensors[m.a_name].double() for m in hooks_of(method).matrices
    }


def trained(method: WeightTuning, state: State, number: int, clients: Mapping[str, Client]) -> list[Answer]:
    """The answers of the first exchange."""
    found = []
    for name, client in clients.items():
        task = method.configure(state, number, {name: Work(epochs=2)})[name]
        update = method.execute(task, client)
        method.check(task, update)
        found.append(Answer(name, task, update))
    return found


def projected(method: WeightTuning, state: State, number: int, clients: Mapping[str, Client]) -> list[Answer]:
    """The answers of the second exchange."""
    tasks = method.configure(state, number, dict.fromkeys(clients, Work()))
    found = []
    for name, task in tasks.items():
        update = method.execute(task, clients[name])
        method.check(task, update)
        found.append(Answer(name, task, update))
    return found


def best(product: Tensor, rank: int) -> Tensor:
    u, values, v = torch.linalg.svd(product)
    return (u[:, :rank] * values[:rank]) @ v[:rank]


def remembered(method: WeightTuning, client: Client, start: Tensors) -> Tensors:
    """The client's own B A, from what it keeps between the exchanges."""
    kept = {name.removeprefix(FACTORS): tensor for name, tensor in client.memory.tensors.items()}
    moved = products(method, kept)
    return {name: moved[name] + product for name, product in products(method, start).items()}


@pytest.mark.parametrize(("model", "kind"), [("bert", "classification"), ("gpt2", "generation")])
def test_a_round_gives_the_best_approximation_of_the_dense_mean(
    tiny: dict[str, str], model: str, kind: str
) -> None:
    """Three clients of rank 4: their mean has rank 12, and thirteen columns hold it. Heads are averaged."""
    method, clients = method_of(tiny[model], kind, oversampling=9), clients_of(kind)
    state = method.initialise()
    for number in (1, 2, 3):
        answers = trained(method, state, number, clients)
        heads = {
            name: sum(
                (a.update.weight / 16 * a.update.tensors[name].double() for a in answers), torch.zeros(())
            )
            for name in answers[0].update.tensors
            if not name.startswith(SKETCH)
        }
        ideal: Tensors = {}
        for name, client in clients.items():
            own = method.trainable.read() if name == "c" else None
            for matrix, product in remembered(method, client, state.tensors).items():
                if own is not None:  # the model is still the last client's
                    torch.testing.assert_close(
                        product, products(method, own)[matrix], rtol=1e-4, atol=1e-5 * float(product.norm())
                    )
                ideal[matrix] = ideal.get(matrix, torch.zeros(())) + SIZES[name] / 16 * product
        between = method.aggregate(state, answers)
        assert not between.may_end
        assert between.state.values[UNFINISHED] == ProjectTask.kind
        merged = method.aggregate(between.state, projected(method, between.state, number, clients))
        assert merged.may_end
        assert UNFINISHED not in merged.state.values
        assert not merged.state.server
        assert not any(client.memory.tensors for client in clients.values())
        for name, product in products(method, merged.state.tensors).items():
            size = float(ideal[name].norm())
            torch.testing.assert_close(product, best(ideal[name], 4), rtol=0, atol=1e-5 * size)
        missed = sum(float((ideal[n] - best(ideal[n], 4)).square().sum()) for n in ideal)
        error = (missed / sum(float(p.square().sum()) for p in ideal.values())) ** 0.5
        assert merged.report["estimated_aggregation_error"] == pytest.approx(error, rel=1e-3, abs=1e-5)
        for name, moved in heads.items():
            wanted = state.tensors[name] + moved
            torch.testing.assert_close(merged.state.tensors[name].double(), wanted, rtol=1e-5, atol=1e-6)
        state = merged.state
    assert bool(heads) == (kind == "classification")


def test_a_client_that_is_lost_between_the_exchanges(tiny: dict[str, str]) -> None:
    """The mean is of those that answered both, on the bases of all."""
    method, clients = method_of(tiny["bert"], oversampling=0), clients_of()
    state = method.initialise()
    between = method.aggregate(state, trained(method, state, 1, clients)).state
    own = {name: remembered(method, client, state.tensors) for name, client in clients.items()}
    left = {name: clients[name] for name in ("a", "b")}
    merged = method.aggregate(between, projected(method, between, 1, left))
    for name, product in products(method, merged.state.tensors).items():
        mean = (3 * own["a"][name] + 8 * own["b"][name]) / 11
        basis = between.server[BASIS + name].double()
        wanted = best(basis @ (basis.T @ mean), 4)
        torch.testing.assert_close(product, wanted, rtol=0, atol=1e-5 * float(mean.norm()))
    assert clients["c"].memory.values[FACTORS_ROUND] == 1  # until it trains again
    assert any(name.startswith(FACTORS) for name in clients["c"].memory.tensors)
    with pytest.raises(AggregationError, match="nobody answered the second exchange"):
        method.aggregate(between, [])


def test_clients_share_the_random_matrix_of_a_round(tiny: dict[str, str]) -> None:
    one, other = (hooks_of(method_of(tiny["bert"])) for _ in range(2))
    assert one.sketches is not None
    assert other.sketches is not None
    matrix = one.matrices[0]
    assert torch.equal(one.sketches.omega(matrix, 3), other.sketches.omega(matrix, 3))
    assert not torch.equal(one.sketches.omega(matrix, 3), one.sketches.omega(matrix, 4))
    assert not torch.equal(one.sketches.omega(matrix, 3), one.sketches.omega(one.matrices[1], 3))


def test_unsound_tasks_and_answers_are_refused(tiny: dict[str, str]) -> None:
    method, clients = method_of(tiny["bert"]), clients_of()
    state = method.initialise()
    answers = trained(method, state, 1, clients)
    sketch = next(name for name in answers[0].update.tensors if name.startswith(SKETCH))
    for wrong, message in (
        ({sketch: torch.zeros(3, 3)}, "has shape"),
        ({sketch: torch.full_like(answers[0].update.tensors[sketch], torch.nan)}, "not finite"),
        ({"lora_A": torch.zeros(1)}, "wrong tensor names"),
    ):
        update = replace(answers[0].update, tensors={**answers[0].update.tensors, **wrong})
        with pytest.raises(UpdateError, match=message):
            method.check(answers[0].task, update)
    between = method.aggregate(state, answers).state
    task = method.configure(between, 1, {"a": Work()})["a"]
    assert isinstance(task, ProjectTask)
    name = next(iter(task.tensors))
    for tensors, message in (
        ({**task.tensors, name: 2 * task.tensors[name]}, "not orthonormal"),
        ({**task.tensors, name: task.tensors[name] * torch.nan}, "not orthonormal"),
        ({**task.tensors, name: task.tensors[name][:, :2]}, "has shape"),
        ({}, "other tensors than the bases"),
    ):
        with pytest.raises(UpdateError, match=message):
            method.execute(replace(task, tensors=tensors), clients["a"])
    with pytest.raises(UpdateError, match="round 2: no trained factors"):
        method.execute(replace(task, round_number=2), clients["a"])
    answer = method.execute(task, clients["a"])
    method.check(task, answer)
    with pytest.raises(UpdateError, match="a second time"):
        method.execute(task, clients["a"])
    key = next(iter(answer.tensors))
    for wrong_answer, message in (
        (replace(answer, weight=-1.0), "weight -1.0"),
        (replace(answer, tensors={key: answer.tensors[key]}), "wrong tensor names"),
        (replace(answer, tensors={**answer.tensors, key: answer.tensors[key] * torch.inf}), "not finite"),
    ):
        with pytest.raises(UpdateError, match=message):
            method.check(task, wrong_answer)
    with pytest.raises(UpdateError, match="TrainTask"):
        make(tiny["bert"], "lora", rank=4).execute(task, clients["b"])


def test_cohorts_answer_as_clients_alone(tiny: dict[str, str]) -> None:
    together, alone = (method_of(tiny["bert"]) for _ in range(2))
    states = []
    for method, joint in ((together, True), (alone, False)):
        clients, state = clients_of(), method.initialise()
        while True:
            tasks = method.configure(state, 1, dict.fromkeys(clients, Work(epochs=1)))
            pairs = [(task, clients[name]) for name, task in tasks.items()]
            updates = (
                method.execute_together(pairs) if joint else [method.execute(task, c) for task, c in pairs]
            )
            answers = []
            for (task, client), update in zip(pairs, updates, strict=True):
                assert not isinstance(update, Exception), update
                answers.append(Answer(client.name, task, update))
            state = method.aggregate(state, answers).state
            if UNFINISHED not in state.values:
                break
        states.append(state.tensors)
    for name, product in products(together, states[0]).items():
        other = products(alone, states[1])[name]
        torch.testing.assert_close(product, other, rtol=0, atol=1e-4 * float(other.norm()))


RUN: dict[str, Any] = {
    "method": {"name": "lora", "variant": "fedask", "rank": 2, "oversampling": 3},
    "training": {"batch_size": 8, "learning_rate": 0.01, "local_steps": 2},
    "rounds": {"count": 3, "clients_per_round": 3},
    "evaluation": {"batch_size": 32, "untuned": False},
}


@pytest.mark.parametrize("more", ["plain", "hidden rows", "int8 and a fitted head"])
def test_runs_go_on_bit_by_bit(small: dict[str, Any], tmp_path: Path, more: str) -> None:
    sections: dict[str, Any] = {
        "plain": {},
        "hidden rows": {
            "privacy": {"unit": "example", "noise_multiplier": 0.8, "delta": 1e-3, "randomness": "seeded"}
        },
        "int8 and a fitted head": {
            "compression": {"kind": "int8"},
            "training": {**RUN["training"], "fit_head_rounds": [1]},
        },
    }[more]
    recipe = {**small, **RUN, **sections}
    whole = fedcustom.run(recipe, out=tmp_path / "whole")
    with pytest.raises(RuntimeError, match="stopped"):
        fedcustom.run(recipe, out=tmp_path / "parts", callbacks=[StopAt(2)])
    parts = fedcustom.run(recipe, out=tmp_path / "parts", resume=True)
    one, other = (Checkpoints(run.directory / "checkpoints").load(3).state for run in (whole, parts))
    assert equal(one.tensors, other.tensors)
    assert one.values == other.values
    rows = [row for row in rows_of(whole.directory) if row["round"]]
    assert [without_seconds(row) for row in rows] == [
        without_seconds(row) for row in rows_of(parts.directory) if row["round"]
    ]
    fitted = more.endswith("head")
    for row in rows[fitted:]:
        assert len(row["answered"]) == 3
        assert 0 <= row["method"]["estimated_aggregation_error"] < 1
    assert not list((whole.directory / "checkpoints").rglob("clients/*.safetensors")), "nothing is kept"


def test_bytes_are_those_of_the_outline(small: dict[str, Any], tmp_path: Path) -> None:
    told: list[Any] = []

    class Outlined(fedcustom.Callback):
        def on_outline(self, outline: Any) -> None:
            told.append(outline)

    run = fedcustom.run({**small, **RUN}, out=tmp_path / "run", callbacks=[Outlined()])
    rows = [row for row in rows_of(run.directory) if row["round"]]
    up = sum(sum(row["bytes_up"].values()) for row in rows) / 9
    down = sum(sum(row["bytes_down"].values()) for row in rows) / 9
    assert told[0].up == pytest.approx(up, rel=0.01)
    assert told[0].down == pytest.approx(down, rel=0.01)


class Losing:
    """Fails clients in the second exchange of chosen rounds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lost: dict[int, tuple[str, ...]]) -> None:
        real = SketchExchange.execute

        def execute(exchange: SketchExchange, task: Any, client: Client) -> ProjectionUpdate:
            if client.name in lost.get(task.round_number, ()):
                raise UpdateError("lost")
            return real(exchange, task, client)

        monkeypatch.setattr(SketchExchange, "execute", execute)


def test_lost_clients_in_a_run(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {**small, **RUN, "rounds": {"count": 3, "min_clients": 2}}
    every = tuple(f"site-{number}" for number in range(4))
    Losing(monkeypatch, {1: every[:1], 2: every[:3], 3: every})
    run = fedcustom.run(recipe, out=tmp_path / "run")
    first, second, third = (row for row in rows_of(run.directory) if row["round"])
    assert first["answered"] == list(every[1:])
    assert first["left_out"] == {every[0]: "lost"}
    assert "refused" not in first
    assert "1 clients answered in all exchanges, rounds.min_clients = 2" in second["refused"]
    assert "nobody answered the second exchange" in third["refused"]
    states = [Checkpoints(run.directory / "checkpoints").load(n).state for n in (1, 3)]
    assert equal(states[0].tensors, states[1].tensors)
    assert not any(UNFINISHED in state.values for state in states)


def test_a_learning_rate_is_searched_with_whole_rounds(small: dict[str, Any], tmp_path: Path) -> None:
    training = {"batch_size": 8, "local_steps": 2, "learning_rate": 0.01, "search_rates": [0.003, 0.01]}
    run = fedcustom.run({**small, **RUN, "training": training, "rounds": {"count": 2}}, out=tmp_path / "run")
    assert all(row["method"] for row in rows_of(run.directory) if row["round"])


def test_far_too_large_projections_are_left_out(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = SketchExchange.execute

    def execute(exchange: SketchExchange, task: Any, client: Client) -> ProjectionUpdate:
        found = real(exchange, task, client)
        if client.name != hostile:
            return found
        return replace(found, tensors={n: 1e5 * t for n, t in found.tensors.items()})

    hostile = "site-2"
    monkeypatch.setattr(SketchExchange, "execute", execute)
    run = fedcustom.run({**small, **RUN, "rounds": {"count": 1}}, out=tmp_path / "run")
    (row,) = (row for row in rows_of(run.directory) if row["round"])
    assert "norm" in row["left_out"][hostile]
    assert len(row["answered"]) == 3
    assert row["method"]["estimated_aggregation_error"] < 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"compression": {"kind": "int8", "down": True}}, "compression.down: .*'fedask'"),
        ({"compression": {"kind": "int8", "error_feedback": True}}, "compression.error_feedback: "),
        ({"participation": {"buffer": 2}}, "participation.buffer: .*'fedask'"),
        (
            {"privacy": {"unit": "client", "epsilon": 8, "delta": 1e-5}},
            "'fedask': one client's part in what the server releases is not bounded",
        ),
        ({"method": {**RUN["method"], "client_ranks": [1, 2]}}, "'fedask' needs one rank"),
        ({"method": {**RUN["method"], "dora": True}}, "dora = true: .*'fedask'"),
        ({"method": {"name": "lora", "oversampling": 4}}, "oversampling = 4: needs variant 'fedask'"),
        ({"method": {**RUN["method"], "oversampling": -1}}, "method.oversampling = -1"),
    ],
)
def test_refusals_name_their_key(small: dict[str, Any], values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe({**small, "method": RUN["method"], **values})


def test_robust_rules_and_optimisers_are_refused(small: dict[str, Any], tmp_path: Path) -> None:
    for key, value in (("rule", "krum"), ("server_optimizer", "fedadam"), ("correction", "feddyn")):
        with pytest.raises(RecipeError, match=f"aggregation.{key} = .*fedask is a rule of its own"):
            fedcustom.run({**small, **RUN, "aggregation": {key: value}}, out=tmp_path / key)


def test_recipes_without_it_are_as_they_were() -> None:
    settings = load_recipe({"method": {"name": "lora"}, "data": {"source": "x.jsonl"}}).method
    assert settings.model_dump().get("oversampling") is None


def test_aggregates_may_end_a_round_by_default() -> None:
    assert Aggregate(State({})).may_end
    assert (TrainTask.exchange, ProjectTask.exchange) == (1, 2)
    assert ProjectTask(round_number=1).continues
    assert not TrainTask(round_number=1).continues
