"""Drift corrections, partial and late work, hostile clients, compression, personalisation: whole rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fedcustom
from fedcustom.aggregation.settings import AggregationSettings
from fedcustom.core.errors import RecipeError
from fedcustom.core.seeds import name_seed
from fedcustom.core.tensors import Tensors, norm
from fedcustom.data.build import build_data
from fedcustom.data.examples import ClientData, FederatedData, LearningTask
from fedcustom.data.tokens import example_order
from fedcustom.federated.build import make_method
from fedcustom.federated.resolve import resolved
from fedcustom.federated.run_directory import Checkpoints
from fedcustom.federated.schedule import last_uses, plan_rounds
from fedcustom.methods import Answer, Client, State, WeightTuning, Work
from fedcustom.methods.tuning.local_training import batch_ranges
from fedcustom.methods.tuning.messages import TrainTask
from fedcustom.models.load import load_base
from fedcustom.recipe.recipe import load_recipe
from fedcustom.simulation.settings import AttackSettings
from fedcustom.transport.channel import Channel
from fedcustom.updates.attack import attack, hostile_clients
from fedcustom.updates.settings import CompressionSettings
from helpers.methods import classification_examples, make
from helpers.runs import rows_of

SIZES = {"a": 4, "b": 8}
SGD = {"optimizer": "sgd", "learning_rate": 0.1}


def play(method: WeightTuning, rounds: int, clients: dict[str, Client]) -> list[Tensors]:
    """Rounds with everybody; the global tensors after each."""
    state, states = method.initialise(), []
    for number in range(1, rounds + 1):
        answers = []
        for name, client in clients.items():
            task = method.configure(state, number, {name: Work(epochs=1)})[name]
            update = method.execute(task, client)
            method.check(task, update)
            answers.append(Answer(name, task, update))
        state = method.aggregate(state, answers).state
        states.append(state.tensors)
    return states


def clients_of() -> dict[str, Client]:
    return {n: Client(n, ClientData(n, classification_examples(size))) for n, size in SIZES.items()}


def batches_of(method: WeightTuning, size: int, ranges: list[tuple[int, int]], seed: list[int]) -> Any:
    """The client's batches, from its stream of examples."""
    examples, first = method.tokens(classification_examples(size)), ranges[0][0]
    order = example_order(size, first, ranges[-1][1], seed)
    for start, stop in ranges:
        yield method.objective.collate([examples[i] for i in order[start - first : stop - first]])


def plain_changes(method: WeightTuning, start: Tensors, shifts: dict[str, Tensors], number: int) -> Any:
    """What each client adds to ``start`` in plain gradient steps with a constant added to its gradients."""
    changes = {}
    for name, size in SIZES.items():
        seed = [method.context.seed, 5, name_seed(name)]
        ranges = [(i + size * (number - 1), i + 4 + size * (number - 1)) for i in range(0, size, 4)]
        method.trainable.write(start)
        method.trainable.model.eval()
        for batch in batches_of(method, size, ranges, seed):
            loss = method.objective.loss(method.trainable.model, batch)
            gradients = torch.autograd.grad(loss, list(method.trainable.parameters.values()))
            with torch.no_grad():
                for (key, parameter), gradient in zip(
                    method.trainable.parameters.items(), gradients, strict=True
                ):
                    parameter -= 0.1 * (gradient + shifts[name].get(key, torch.zeros(())))
        changes[name] = {k: t - start[k] for k, t in method.trainable.read().items()}
    return changes


def test_scaffold_follows_the_paper(tiny: dict[str, str]) -> None:
    """Karimireddy et al. 2020, algorithm 1 with option II, written out for two rounds."""
    aggregation = AggregationSettings(correction="scaffold", weighting="uniform")
    method = make(tiny["bert"], "lora", training=SGD, aggregation=aggregation, clients=2)
    ours = play(method, 2, clients_of())

    by_hand = make(tiny["bert"], "lora", training=SGD)
    x = by_hand.initialise().tensors
    server = {k: torch.zeros_like(t) for k, t in x.items()}
    own = {name: dict(server) for name in SIZES}
    for number in (1, 2):
        shifts = {n: {k: server[k] - own[n][k] for k in x} for n in SIZES}
        changes = plain_changes(by_hand, x, shifts, number)
        new = {
            n: {k: own[n][k] - server[k] - changes[n][k] / (SIZES[n] // 4 * 0.1) for k in x} for n in SIZES
        }
        server = {k: server[k] + sum(new[n][k] - own[n][k] for n in SIZES) / 2 for k in x}
        own = new
        x = {k: x[k] + sum(changes[n][k] for n in SIZES) / 2 for k in x}
        for key, tensor in x.items():
            torch.testing.assert_close(ours[number - 1][key], tensor, rtol=1e-4, atol=1e-6)


def test_feddyn_follows_the_paper(tiny: dict[str, str]) -> None:
    """Acar et al. 2021, algorithm 1, with one step a client and round, so that the proximal term is zero."""
    alpha = 0.3
    aggregation = AggregationSettings(correction="feddyn", feddyn_alpha=alpha, weighting="uniform")
    training = {**SGD, "batch_size": 8}
    method = make(tiny["bert"], "lora", training=training, aggregation=aggregation, clients=4)
    ours = play(method, 3, clients_of())

    by_hand = make(tiny["bert"], "lora", training=training)
    x = by_hand.initialise().tensors
    h = {k: torch.zeros_like(t) for k, t in x.items()}
    own = {name: dict(h) for name in SIZES}
    for number in (1, 2, 3):
        changes = {}
        for name, size in SIZES.items():
            seed = [0, 5, name_seed(name)]
            by_hand.trainable.write(x)
            by_hand.trainable.model.eval()
            (batch,) = batches_of(by_hand, size, [(size * (number - 1), size * number)], seed)
            loss = by_hand.objective.loss(by_hand.trainable.model, batch)
            gradients = torch.autograd.grad(loss, list(by_hand.trainable.parameters.values()))
            changes[name] = {
                k: -0.1 * (g - own[name][k])
                for k, g in zip(by_hand.trainable.parameters, gradients, strict=True)
            }
            own[name] = {k: own[name][k] - alpha * changes[name][k] for k in x}
        h = {k: h[k] - alpha / 4 * sum(changes[n][k] for n in SIZES) for k in x}
        x = {k: x[k] + sum(changes[n][k] for n in SIZES) / 2 - h[k] / alpha for k in x}
        for key, tensor in x.items():
            torch.testing.assert_close(ours[number - 1][key], tensor, rtol=1e-4, atol=1e-6)


def test_scaffold_doubles_what_travels_and_needs_plain_steps(small: dict[str, Any], tmp_path: Path) -> None:
    plain = fedcustom.run(
        small, {"training.optimizer": "sgd", "training.clip_norm": 0}, out=tmp_path / "plain"
    )
    scaffold = fedcustom.run(
        small,
        {"training.optimizer": "sgd", "training.clip_norm": 0, "aggregation.correction": "scaffold"},
        out=tmp_path / "scaffold",
    )
    sizes = [run.summary["bytes"]["up_per_client_round"] for run in (plain, scaffold)]
    assert sizes[1] == pytest.approx(2 * sizes[0], rel=0.1)
    with pytest.raises(RecipeError, match="'scaffold': is defined for plain gradient steps"):
        load_recipe(small, {"aggregation.correction": "scaffold"})


# --- who works, and when ---


def federation(count: int) -> FederatedData:
    clients = {f"c{i}": ClientData(f"c{i}", classification_examples(10)) for i in range(count)}
    return FederatedData(LearningTask("classification", ("a", "b", "c")), clients, [], [], False)


def plan(count: int, **more: Any) -> Any:
    recipe = load_recipe(
        {
            "clients": {"partition": "iid", "count": count},
            "rounds": {"count": 40, "clients_per_round": 5, "min_clients": 2},
            "participation": more,
        }
    )
    return plan_rounds(recipe, federation(count))


def test_drop_outs() -> None:
    rounds = plan(10, dropout=0.5)
    lost = [sum(a.absent for a in cohort.values()) for cohort in rounds]
    assert all(5 - n >= 2 for n in lost)
    assert 1.5 < np.mean(lost) < 3
    assert rounds == plan(10, dropout=0.5)


def test_partial_work() -> None:
    rounds = plan(10, partial=0.6, minimum_work=0.3)
    amounts = [a.amount for cohort in rounds for a in cohort.values()]
    less = [a.examples for a in amounts if a.examples is not None]
    assert 0.5 < len(less) / len(amounts) < 0.7
    assert min(less) >= 3
    assert max(less) <= 10


@given(count=st.integers(1, 60), batch_size=st.integers(1, 16), rounds=st.integers(1, 12))
def test_a_part_of_an_epoch_goes_on_where_the_last_one_ended(
    count: int, batch_size: int, rounds: int
) -> None:
    """With 1 / rounds of an epoch in each round, examples come once a pass, in batches that end with it."""
    part, start, seen = max(1, round(1 / rounds * count)), 0, list[int]()
    for _ in range(rounds):
        ranges = batch_ranges(count, start, batch_size, Work(epochs=1 / rounds))
        assert sum(stop - begin for begin, stop in ranges) == part
        assert all(stop - begin <= batch_size for begin, stop in ranges)
        assert all(begin // count == (stop - 1) // count for begin, stop in ranges)
        seen += [i for begin, stop in ranges for i in range(begin, stop)]
        start = ranges[-1][1]
    assert seen == list(range(part * rounds))


def test_a_centralised_run_sees_as_many_examples_as_parts_of_epochs() -> None:
    """Three of the ten clients with ten examples each, a quarter of a pass: 3 * round(2.5) examples."""
    recipe = load_recipe(
        {
            "baseline": "centralised",
            "clients": {"partition": "iid", "count": 10},
            "rounds": {"count": 2, "clients_per_round": 3},
            "training": {"local_epochs": 0.25},
        }
    )
    (first, second) = plan_rounds(recipe, federation(10))
    assert first["centralised"].amount == second["centralised"].amount == Work(examples=6)


@given(
    st.integers(1, 5), st.sampled_from(["constant", "uniform", "exponential", "lognormal"]), st.integers(5, 9)
)
@settings(max_examples=25, deadline=None)
def test_buffered_rounds(buffer: int, latency: str, count: int) -> None:
    rounds = plan(count, buffer=buffer, latency=latency)
    working: dict[str, int] = {}
    for number, cohort in enumerate(rounds, start=1):
        assert sum(not a.absent for a in cohort.values()) == buffer
        for name, assignment in cohort.items():
            assert 0 <= assignment.since < number
            # Nobody starts anew before the round in which its last answer was merged.
            assert assignment.since >= working.get(name, 0)
            working[name] = number
    uses = last_uses(rounds)
    assert all(uses[a.since] >= n for n, cohort in enumerate(rounds, 1) for a in cohort.values())


def test_late_answers_are_merged_into_the_newest_state(small: dict[str, Any], tmp_path: Path) -> None:
    """A buffered run by hand: each change from the state its client started from, discounted by its age."""
    recipe = resolved(
        load_recipe(
            {
                **small,
                "rounds": {"count": 4, "clients_per_round": 3},
                "participation": {"buffer": 1, "latency": "exponential"},
                "evaluation": {"select": "last"},
            }
        )
    )
    run = fedcustom.run(recipe, out=tmp_path / "run")
    data = build_data(recipe.data, recipe.clients, recipe.seed)
    method = make_method(recipe, load_base(recipe.model, data.task, recipe.seed), data)
    clients = {name: Client(name, part) for name, part in data.clients.items()}
    states = [method.initialise()]
    late = []
    for number, cohort in enumerate(plan_rounds(recipe, data), start=1):
        ((name, assignment),) = cohort.items()
        task = method.configure(states[assignment.since], assignment.since + 1, {name: assignment.amount})[
            name
        ]
        update = method.execute(task, clients[name])
        age = number - 1 - assignment.since
        late.append(age)
        factor = (1 + age) ** -0.5
        tensors = {k: t + factor * update.tensors[k] for k, t in states[-1].tensors.items()}
        states.append(State(tensors))
    assert max(late) > 0
    final = Checkpoints(run.directory / "checkpoints").load(4).state.tensors
    for key, tensor in states[-1].tensors.items():
        torch.testing.assert_close(final[key], tensor, rtol=1e-5, atol=1e-6)
    assert [sum(row["late"].values()) for row in rows_of(run.directory)[1:]] == late


def test_a_buffered_run_goes_on_where_it_stopped(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {
        **small,
        "rounds": {"count": 6, "clients_per_round": 3, "checkpoint_every": 1},
        "participation": {"buffer": 1, "dropout": 0.0},
    }
    whole = fedcustom.run(recipe, out=tmp_path / "whole")
    original = WeightTuning.aggregate
    calls = []

    def dies(method: WeightTuning, state: Any, answers: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(method, state, answers)

    with monkeypatch.context() as patch:
        patch.setattr(WeightTuning, "aggregate", dies)
        with pytest.raises(KeyboardInterrupt):
            fedcustom.run(recipe, out=tmp_path / "again")
    again = fedcustom.run(recipe, out=tmp_path / "again", resume=True)
    ours, theirs = (Checkpoints(r.directory / "checkpoints").load(6).state.tensors for r in (again, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_dropped_clients_are_noted_without_a_warning(small: dict[str, Any], tmp_path: Path) -> None:
    run = fedcustom.run(small, {"participation.dropout": 0.6, "rounds.count": 4}, out=tmp_path / "run")
    left_out = [row["left_out"] for row in rows_of(run.directory)[1:]]
    assert any(left_out)
    assert {reason for one in left_out for reason in one.values()} == {"dropped out"}
    assert not (run.directory / "warnings.log").exists()


# --- hostile clients ---


def test_attacks() -> None:
    names = [f"c{i}" for i in range(50)]
    chosen = hostile_clients(names, AttackSettings(kind="sign_flip", fraction=0.2), 3)
    assert len(chosen) == 10
    assert hostile_clients(names, AttackSettings(), 3) == frozenset()
    update = fedcustom.methods.Update({"w": torch.tensor([3.0, -4.0])}, 2.0)
    flipped = attack(update, AttackSettings(kind="sign_flip", scale=10), [0])
    assert flipped.tensors["w"].tolist() == [-30.0, 40.0]
    large = fedcustom.methods.Update({"w": torch.randn(10_000)}, 2.0)
    noise = attack(large, AttackSettings(kind="random", scale=2), [1])
    assert norm(noise.tensors) == pytest.approx(2 * norm(large.tensors), rel=0.05)
    again = attack(large, AttackSettings(kind="random", scale=2), [1])
    assert torch.equal(noise.tensors["w"], again.tensors["w"])


@pytest.mark.parametrize("rule", ["median", "krum", "fltrust", "centred_clipping"])
def test_robust_runs(small: dict[str, Any], tmp_path: Path, rule: str) -> None:
    # As it was trained: a temperature makes a model that says nothing of use say it modestly.
    attacked = {"attack.kind": "sign_flip", "attack.fraction": 0.25, "evaluation.calibrate": False}
    run = fedcustom.run(small, {**attacked, "aggregation.rule": rule}, out=tmp_path / "run")
    hit = fedcustom.run(small, attacked, out=tmp_path / "mean")
    assert run.summary["metrics"]["loss"] < hit.summary["metrics"]["loss"]


# --- compression ---


def test_a_channel_counts_what_it_sends() -> None:
    generator = torch.Generator().manual_seed(0)
    start = {"prefix": torch.randn(6, 2, 12, 16, 32, generator=generator)}
    channel = Channel(CompressionSettings(kind="int8", down=True), start)
    state = {"prefix": start["prefix"] + 0.1 * torch.randn(start["prefix"].shape, generator=generator)}
    task = TrainTask(state, round_number=1)
    received, size = channel.down(task)
    assert size < 0.27 * 4 * state["prefix"].numel()
    # What is rounded is the difference from the start, so the error is small against that.
    error = (received.tensors["prefix"] - state["prefix"]).abs().max()
    assert 0 < error < 0.005
    assert channel.down(task)[0].tensors["prefix"] is received.tensors["prefix"]  # once a cohort


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "int8", "int4", "top_k"])
def test_compressed_runs(small: dict[str, Any], tmp_path: Path, kind: str) -> None:
    plain = fedcustom.run(small, out=tmp_path / "plain")
    run = fedcustom.run(
        small,
        {
            "compression.kind": kind,
            "compression.error_feedback": True,
            "compression.down": kind != "top_k",
        },
        out=tmp_path / "run",
    )
    for way in ("up_per_client_round", *(["down_per_client_round"] if kind != "top_k" else [])):
        assert run.summary["bytes"][way] < plain.summary["bytes"][way]
    checkpoint = Checkpoints(run.directory / "checkpoints").load(2)
    assert checkpoint.files  # what each client still owes
    assert run.summary["metrics"]["loss"] == pytest.approx(plain.summary["metrics"]["loss"], abs=0.2)


# --- personalisation ---


def test_a_head_that_stays_with_the_client(small: dict[str, Any], tmp_path: Path) -> None:
    run = fedcustom.run(small, {"personalisation.keep": ["head"]}, out=tmp_path / "run")
    state = Checkpoints(run.directory / "checkpoints").load(2)
    start = make_start(run.recipe)
    assert torch.equal(state.state.tensors["classifier.weight"], start["classifier.weight"])
    own = run.summary["personalised"]
    assert own["clients"].keys() == run.summary["clients"].keys()
    assert own["client_mean"] != run.summary["client_mean"]
    plain = fedcustom.run(small, out=tmp_path / "plain")
    head = 4 * run.summary["head_parameters"]
    saved = plain.summary["bytes"]["up_total"] - run.summary["bytes"]["up_total"]
    assert saved >= head
    with pytest.raises(RecipeError, match="keep = 'haed': no trained tensor has that in its name"):
        fedcustom.run(small, {"personalisation.keep": ["haed"]}, out=tmp_path / "wrong")


def make_start(recipe: Any) -> Tensors:
    data = build_data(recipe.data, recipe.clients, recipe.seed)
    base = load_base(recipe.model, data.task, recipe.seed)
    return dict(make_method(recipe, base, data).initialise().tensors)


def test_fine_tuning_after_the_last_round(small: dict[str, Any], tmp_path: Path) -> None:
    run = fedcustom.run(small, {"personalisation.finetune_epochs": 3}, out=tmp_path / "run")
    plain = fedcustom.run(small, out=tmp_path / "plain")
    assert run.summary["client_mean"] == plain.summary["client_mean"]
    assert run.summary["personalised"]["client_mean"] != plain.summary["client_mean"]
    assert "personalised" not in plain.summary


# --- settings that do not go together ---


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"baseline": "local", "attack.kind": "sign_flip"}, r"\[attack\]: needs baseline = 'federated'"),
        ({"baseline": "centralised", "compression.kind": "int8"}, r"\[compression\]: needs baseline"),
        ({"compression.error_feedback": True}, "error_feedback = true: nothing is compressed"),
        ({"compression.kind": "top_k", "compression.down": True}, "not with kind = 'top_k'"),
        ({"personalisation.keep": [""]}, "an empty text names every tensor"),
        ({"aggregation.correction": "feddyn", "aggregation.rule": "krum"}, "needs aggregation.rule = 'mean'"),
        ({"aggregation.correction": "feddyn", "training.proximal": 0.1}, "a proximal term of its own"),
        ({"aggregation.correction": "feddyn", "participation.buffer": 2}, r"no participation\.buffer"),
        ({"participation.buffer": 2, "aggregation.rule": "fltrust"}, "does not go with aggregation.rule"),
        (
            {"participation.buffer": 2, "method": {"name": "lora", "variant": "rolora"}},
            "'rolora' needs all at one state",
        ),
        (
            {"method": {"name": "lora", "variant": "flora"}, "compression.kind": "int8",
             "compression.error_feedback": True},
            "sends other tensors in each round",
        ),
        ({"method.name": "prefix", "method.compression": "cluster"}, "has no effect with kind"),
        (
            {"method.name": "prefix", "method.kind": "kv", "method.compression": "cluster"},
            "has no effect here",
        ),
        ({"rounds.count": "3"}, "must be a valid integer"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe({}, overrides)


def test_baselines_of_a_recipe_with_an_attack() -> None:
    recipe = load_recipe({}, {"attack.kind": "sign_flip", "compression.kind": "int8"})
    baseline = recipe.for_method("prefix", "centralised")
    assert (baseline.attack.kind, baseline.compression.kind) == ("none", "none")
    assert recipe.for_method("lora").attack.kind == "sign_flip"


def test_the_centralised_baseline_knows_no_rules(small: dict[str, Any], tmp_path: Path) -> None:
    base = {**small, "baseline": "centralised"}
    plain = fedcustom.run(base, out=tmp_path / "plain")
    other = fedcustom.run(
        base,
        {"aggregation.server_optimizer": "fedadam", "aggregation.rule": "median"},
        out=tmp_path / "other",
    )
    assert other.summary["metrics"] == plain.summary["metrics"]


@pytest.mark.parametrize("kept", ["lora_B", "head"])
def test_parts_that_stay_leave_no_wrong_figure(small: dict[str, Any], tmp_path: Path, kept: str) -> None:
    run = fedcustom.run(
        {**small, "method": {"name": "lora"}}, {"personalisation.keep": [kept]}, out=tmp_path / "run"
    )
    rows = rows_of(run.directory)[1:]
    assert all(("method" in row) == (kept == "head") for row in rows)


def test_corrections_beside_tensors_that_stay(small: dict[str, Any], tmp_path: Path) -> None:
    sgd = {"training.optimizer": "sgd", "training.clip_norm": 0, "aggregation.correction": "scaffold"}
    lora = {**small, "method": {"name": "lora", "rank": 3, "private_rank": 2}}
    fedcustom.run(lora, sgd, out=tmp_path / "lora")
    fedcustom.run(small, {**sgd, "personalisation.keep": ["head"]}, out=tmp_path / "prefix")
    with pytest.raises(RecipeError, match="a network gives anew in each round"):
        fedcustom.run(small, {**sgd, "method.reparametrise": True}, out=tmp_path / "network")


def test_one_client_at_a_time_is_never_late() -> None:
    recipe = load_recipe(
        {
            "clients": {"partition": "iid", "count": 4},
            "rounds": {"count": 10, "clients_per_round": 1},
            "participation": {"buffer": 1},
        }
    )
    for number, cohort in enumerate(plan_rounds(recipe, federation(4)), start=1):
        assert [a.since for a in cohort.values()] == [number - 1]


def test_drop_outs_of_a_buffered_run_are_replaced() -> None:
    rounds = plan(12, buffer=2, dropout=0.4)
    assert any(a.absent for cohort in rounds for a in cohort.values())
    assert all(sum(not a.absent for a in cohort.values()) == 2 for cohort in rounds)


@pytest.mark.parametrize("merging", ["mean", "matched"])
def test_a_change_that_came_very_late_moves_little(tiny: dict[str, str], merging: str) -> None:
    method = make(tiny["bert"], "prefix", kind="kv", length=4, merging=merging)
    old = method.initialise()
    client = Client("a", ClientData("a", classification_examples(8)))
    task = method.configure(old, 1, {"a": Work(epochs=2)})["a"]
    update = method.execute(task, client)
    newest = State({name: tensor + 1.0 for name, tensor in old.tensors.items()})
    merged = method.aggregate(newest, [Answer("a", task, update, discount=1e-3)]).state.tensors
    for name, tensor in newest.tensors.items():
        wanted = tensor + 1e-3 * update.tensors[name]
        torch.testing.assert_close(merged[name], wanted, rtol=1e-5, atol=1e-6)
