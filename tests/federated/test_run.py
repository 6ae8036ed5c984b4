"""Whole runs on tiny models: rounds, baselines, records, failures and determinism."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import fedcustom
from fedcustom.core.errors import DataError, ModelError, RecipeError, RunError
from fedcustom.core.tensors import equal
from fedcustom.data.build import build_data
from fedcustom.evaluation.metrics import is_better
from fedcustom.evaluation.settings import TEXT_METRICS
from fedcustom.federated.build import make_method
from fedcustom.federated.callbacks import Callback
from fedcustom.federated.resolve import resolved
from fedcustom.federated.run import run_recipe
from fedcustom.federated.run_directory import Checkpoints
from fedcustom.federated.schedule import plan_rounds
from fedcustom.methods import WeightTuning, Work
from fedcustom.methods.tuning.client import TuningClient
from fedcustom.methods.tuning.messages import TrainTask
from fedcustom.models.load import load_base
from fedcustom.recipe.recipe import load_recipe
from fedcustom.transport import wire
from fedcustom.transport.in_process import InProcessTransport
from fedcustom.transport.protocol import Reply
from helpers.runs import rows_of, tensors_of, without_seconds

NUMBERS = 2 * (2 * (32 + 32) + (32 + 1 + 32))
"""Of a memory in two layers: two slots beside attention, of width 32, and one beside the other network."""


@pytest.mark.parametrize(
    ("method", "width"),
    [
        # AdamW makes whole steps of gradients that are rounding, as those of keys whose values are nearly
        # zero: to the last digits a memory's clients agree where each trains alone in the run too.
        ({"name": "prefix"}, 1),
        ({"name": "prefix", "kind": "kv"}, None),
        ({"name": "lora"}, None),
        ({"name": "soft_prompt"}, None),
        ({"name": "full"}, None),
    ],
)
def test_the_rounds_are_federated_averaging(
    small: dict[str, Any], tmp_path: Path, method: dict[str, Any], width: int | None
) -> None:
    """Two rounds of the run against the same two rounds put together by hand."""
    training = small["training"] | ({"cohort_width": width} if width else {})
    given = {**small, "method": method, "training": training, "evaluation": {"select": "last"}}
    recipe = resolved(load_recipe(given))
    run = fedcustom.run(recipe, out=tmp_path / "run")

    data = build_data(recipe.data, recipe.clients, recipe.seed)
    by_hand = make_method(recipe, load_base(recipe.model, data.task, recipe.seed))
    assert isinstance(by_hand, WeightTuning)
    state = by_hand.initialise().tensors
    seen = dict.fromkeys(data.clients, 0)
    for number in (1, 2):
        updates = {}
        for name, client_data in data.clients.items():
            memory = fedcustom.methods.Memory(values={"examples_seen": seen[name]} if seen[name] else {})
            client = fedcustom.methods.Client(name, client_data, memory)
            task = TrainTask(state, round_number=number, work=Work(epochs=1))
            updates[name] = by_hand.execute(task, client)
            seen[name] += len(client_data.train)
        total = sum(len(client.train) for client in data.clients.values())
        shares = {name: len(client.train) / total for name, client in data.clients.items()}
        state = {
            key: state[key]
            + sum(shares[name] * update.tensors[key].double() for name, update in updates.items()).float()
            for key in state
        }
    final = Checkpoints(run.directory / "checkpoints").load(2).state.tensors
    for key, tensor in state.items():
        torch.testing.assert_close(final[key], tensor, rtol=1e-5, atol=1e-6)


def test_the_summary_says_what_happened(small: dict[str, Any], tmp_path: Path) -> None:
    run = fedcustom.run(small, {"rounds.count": 3}, out=tmp_path / "run")
    summary = run.summary
    said = [summary[key] for key in ("method", "baseline", "rounds", "seed")]
    assert said == ["prefix", "federated", 3, 0]
    assert summary["trainable_parameters"] == NUMBERS
    assert summary["head_parameters"] == 3 * 33
    assert set(summary["metrics"]) == {"accuracy", "macro_f1", "loss", "calibration_error"}
    predictions = [json.loads(line) for line in (run.directory / "predictions.jsonl").open()]
    confidence = np.array([line["probability"] for line in predictions])
    right = np.array([line["label"] == line["prediction"] for line in predictions])
    places = np.digitize(confidence, np.arange(1, 15) / 15, right=True)
    gaps = [abs((right - confidence)[places == place].sum()) for place in range(15)]
    assert summary["metrics"]["calibration_error"] == pytest.approx(sum(gaps) / len(right), abs=1e-5)
    assert set(summary["clients"]) == {f"site-{i}" for i in range(4)}
    for name in ("accuracy", "macro_f1", "loss", "calibration_error"):
        values = [client[name] for client in summary["clients"].values()]
        assert summary["client_mean"][name] == pytest.approx(np.mean(values))
        worst = max if name in ("loss", "calibration_error") else min
        assert summary["worst_client"][name] == worst(values)
    rows = rows_of(run.directory)
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    best = max(rows[1:], key=lambda row: row["development"]["accuracy"])
    assert summary["best_round"] == best["round"]
    assert summary["bytes"]["up_total"] == sum(sum(row["bytes_up"].values()) for row in rows[1:])
    assert rows[-1]["bytes_up_total"] == summary["bytes"]["up_total"]
    assert (
        sum(summary["seconds"][part] for part in ("train", "evaluate", "aggregate"))
        <= summary["seconds"]["total"]
    )
    assert summary["peak_memory_bytes"] > 10**8
    predictions = [
        json.loads(line) for line in (run.directory / "predictions.jsonl").read_text().splitlines()
    ]
    assert np.mean([p["label"] == p["prediction"] for p in predictions]) == pytest.approx(
        summary["metrics"]["accuracy"]
    )
    assert list(run.history["round"]) == [0, 1, 2, 3]
    assert run.history["development.accuracy"].iloc[-1] == rows[-1]["development"]["accuracy"]
    environment = json.loads((run.directory / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert load_recipe(run.directory / "recipe.toml") == run.recipe


def test_bytes_are_lengths_of_what_is_serialised(small: dict[str, Any], tmp_path: Path) -> None:
    run = fedcustom.run(small, out=tmp_path / "run")
    state = Checkpoints(run.directory / "checkpoints").load(run.summary["best_round"]).state.tensors
    numbers = NUMBERS + 3 * 33
    payload = wire.encode(state, {"weight": 32.0, "loss": 1.0986122886681098, "examples": 32, "steps": 4})
    forms = 250 + sum(len(name) + 75 for name in state)  # of the container, and names and shapes
    assert 4 * numbers < len(payload) < 4 * numbers + forms
    for part in ("up_per_client_round", "down_per_client_round"):
        assert abs(run.summary["bytes"][part] - len(payload)) < 60  # digits of the numbers differ


def test_generation(generation: dict[str, Any], tmp_path: Path) -> None:
    run = fedcustom.run(
        {**generation, "training": {"batch_size": 8, "local_epochs": 2}}, out=tmp_path / "run"
    )
    metrics = run.summary["metrics"]
    assert set(metrics) == {"loss", *TEXT_METRICS}
    assert metrics["loss"] < run.summary["untuned"]["loss"]
    assert run.summary["head_parameters"] == 0
    line = json.loads((run.directory / "predictions.jsonl").read_text().splitlines()[0])
    assert line["source"].endswith(" :")
    assert len(line["references"]) == 2
    assert isinstance(line["prediction"], str)
    # The loss by an independent route: the saved model, one example at a time, with labels given to
    # transformers.
    data = build_data(run.recipe.data, run.recipe.clients, 0)
    model, tokenizer, total, count = run.model(), run.tokenizer(), 0.0, 0
    for example in data.test:
        prompt = tokenizer(example.text)["input_ids"]
        target = [*tokenizer(example.target)["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([[*prompt, *target]])
        labels = torch.tensor([[*[-100] * len(prompt), *target]])
        with torch.no_grad():
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        total, count = total + loss.item() * len(target), count + len(target)
    assert metrics["loss"] == pytest.approx(total / count, rel=1e-4)


def test_the_same_seed_gives_the_same_bits(small: dict[str, Any], tmp_path: Path) -> None:
    small["training"]["dropout"] = True
    first, second = (fedcustom.run(small, out=tmp_path / name) for name in "ab")
    other = fedcustom.run(small, {"seed": 1}, out=tmp_path / "c")
    assert equal(tensors_of(first.directory), tensors_of(second.directory))
    assert list(map(without_seconds, rows_of(first.directory))) == list(
        map(without_seconds, rows_of(second.directory))
    )
    assert not equal(tensors_of(first.directory), tensors_of(other.directory))


def test_training_learns(small: dict[str, Any], tmp_path: Path) -> None:
    small |= {"evaluation": {"select": "last"}}
    run = fedcustom.run(
        small, {"rounds.count": 15, "method.name": "full", "training.learning_rate": 3e-3}, out=tmp_path / "r"
    )
    assert run.summary["metrics"]["accuracy"] > 0.9 > run.summary["untuned"]["accuracy"]


# --- baselines ---


def test_centralised_sees_as_many_examples_and_sends_nothing(small: dict[str, Any], tmp_path: Path) -> None:
    small["rounds"] = {"count": 3, "clients_per_round": 2}
    federated = fedcustom.run(small, out=tmp_path / "federated")
    central = fedcustom.run(small, {"baseline": "centralised"}, out=tmp_path / "central")
    for ours, theirs in zip(rows_of(central.directory)[1:], rows_of(federated.directory)[1:], strict=True):
        assert ours["examples"] == theirs["examples"]
        assert ours["cohort"] == ["centralised"]
    assert central.summary["bytes"] == dict.fromkeys(federated.summary["bytes"], 0)
    assert federated.summary["bytes"]["up_total"] > 0


def test_centralised_is_one_long_training(small: dict[str, Any], tmp_path: Path) -> None:
    """With the optimiser kept, three short rounds are the same as one long one."""
    small |= {"baseline": "centralised", "evaluation": {"select": "last"}}
    short = fedcustom.run(small, {"rounds.count": 3, "training.local_steps": 2}, out=tmp_path / "short")
    long = fedcustom.run(small, {"rounds.count": 1, "training.local_steps": 6}, out=tmp_path / "long")
    for name, tensor in tensors_of(long.directory).items():
        torch.testing.assert_close(tensors_of(short.directory)[name], tensor)


def test_local_clients_learn_alone(small: dict[str, Any], tmp_path: Path) -> None:
    local = fedcustom.run(small, {"baseline": "local", "rounds.count": 2}, out=tmp_path / "local")
    assert local.summary["bytes"]["up_total"] == 0
    state = Checkpoints(local.directory / "checkpoints").load(local.summary["best_round"])
    recipe = local.recipe
    data = build_data(recipe.data, recipe.clients, 0)
    # One client's model is what a run with that client alone would train, with its optimiser kept.
    method = make_method(recipe, load_base(recipe.model, data.task, 0))
    client = fedcustom.methods.Client("site-2", data.clients["site-2"])
    for number in range(1, state.round_number + 1):
        method.execute(
            method.configure(method.initialise(), number, {"site-2": Work(epochs=1)})["site-2"], client
        )
    stored = safetensors.torch.load_file(local.directory / "checkpoints" / "clients" / state.files["site-2"])
    assert equal(client.memory.tensors, stored)
    assert not (local.directory / "model").exists()
    with pytest.raises(RunError, match="one model for each client"):
        local.model()


def test_plans(small: dict[str, Any]) -> None:
    recipe = load_recipe({**small, "rounds": {"count": 30, "clients_per_round": 2}})
    data = build_data(recipe.data, recipe.clients, 0)
    plan = plan_rounds(recipe, data)
    assert plan == plan_rounds(recipe, data)
    assert all(len(work) == 2 for work in plan)
    chosen = [name for work in plan for name in work]
    assert set(chosen) == set(data.clients)
    assert plan_rounds(recipe.model_copy(update={"seed": 1}), data) != plan


# --- clients that fail ---


class Sabotage:
    """Makes chosen clients misbehave in chosen rounds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, faults: dict[tuple[int, str], Any]) -> None:
        original = TuningClient.close

        def close(own: TuningClient, job: Any, result: Any) -> Any:
            update = original(own, job, result)
            fault = faults.get((job.number, job.client.name))
            return fault(update) if fault else update

        monkeypatch.setattr(TuningClient, "close", close)


def raising(update: Any) -> Any:
    raise ValueError("the disk of this site\nis broken")


def with_nan(update: Any) -> Any:
    next(iter(update.tensors.values())).view(-1)[0] = math.nan
    return update


def with_wrong_shape(update: Any) -> Any:
    name = next(iter(update.tensors))
    update.tensors[name] = update.tensors[name][:1]
    return update


class Notes(Callback):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def on_note(self, text: str) -> None:
        self.notes.append(text)


def test_failing_clients_are_left_out(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Sabotage(
        monkeypatch,
        {(1, "site-0"): raising, (1, "site-2"): with_nan, (2, "site-1"): with_wrong_shape},
    )
    notes = Notes()
    run = fedcustom.run(small, out=tmp_path / "run", callbacks=[notes])
    first, second = rows_of(run.directory)[1:]
    assert first["answered"] == ["site-1", "site-3"]
    assert first["left_out"]["site-0"] == "the disk of this site"
    assert "not finite" in first["left_out"]["site-2"]
    assert second["answered"] == ["site-0", "site-2", "site-3"]
    assert "has shape" in second["left_out"]["site-1"]
    assert [text.split(" left out")[0] for text in notes.notes] == [
        "round 1: client site-0", "round 1: client site-2", "round 2: client site-1",
    ]  # fmt: skip
    log = (run.directory / "warnings.log").read_text()
    assert "Traceback" in log
    assert "is broken" in log


def test_a_failing_clients_round_does_not_count(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is merged without a client equals a run in which that client was never asked."""
    recipe = {**small, "rounds": {"count": 1}}
    with monkeypatch.context() as patch:
        Sabotage(patch, {(1, "site-3"): with_nan})
        run = fedcustom.run(recipe, out=tmp_path / "run")
    checked = resolved(load_recipe(recipe))
    data = build_data(checked.data, checked.clients, 0)
    method = make_method(checked, load_base(checked.model, data.task, 0))
    state = method.initialise()
    names = ["site-0", "site-1", "site-2"]
    tasks = method.configure(state, 1, {name: Work(epochs=1) for name in names})
    answers = [
        fedcustom.methods.Answer(
            n, tasks[n], method.execute(tasks[n], fedcustom.methods.Client(n, data.clients[n]))
        )
        for n in names
    ]
    expected = method.aggregate(state, answers).state.tensors
    found = Checkpoints(run.directory / "checkpoints").load(1).state.tensors
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-6)


def test_too_few_answers_stop_the_run_and_it_can_go_on(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {**small, "rounds": {"count": 3, "min_clients": 3}}
    expected = fedcustom.run(recipe, out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        Sabotage(patch, {(2, "site-0"): raising, (2, "site-1"): with_nan})
        with pytest.raises(
            RunError, match=r"round 2: 2 of 4 clients answered, rounds.min_clients = 3.*not finite"
        ):
            fedcustom.run(recipe, out=tmp_path / "run")
    with pytest.raises(RunError, match="unfinished run; go on with --resume"):
        fedcustom.run(recipe, out=tmp_path / "run")
    with pytest.raises(RunError, match="not finished"):
        fedcustom.load(tmp_path / "run")
    resumed = fedcustom.run(recipe, out=tmp_path / "run", resume=True)
    assert equal(tensors_of(resumed.directory), tensors_of(expected.directory))
    assert list(map(without_seconds, rows_of(resumed.directory))) == list(
        map(without_seconds, rows_of(expected.directory))
    )


def test_a_diverging_run_says_so(small: dict[str, Any], tmp_path: Path) -> None:
    small["training"] |= {"optimizer": "sgd", "learning_rate": 1e38, "clip_norm": 1e30, "local_epochs": 3}
    with pytest.raises(RunError, match=r"round 1: 0 of 4 clients answered.*not finite"):
        fedcustom.run(small, out=tmp_path / "run")


# --- directories and what does not fit ---


def test_a_finished_run_is_not_run_again(small: dict[str, Any], tmp_path: Path) -> None:
    fedcustom.run(small, out=tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    notes = Notes()
    fedcustom.run(small, out=tmp_path / "run", callbacks=[notes])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    assert "nothing to do" in notes.notes[0]
    with pytest.raises(RunError, match=r"another recipe's run \(rounds.count = 2 there, 3 here\)"):
        fedcustom.run(small, {"rounds.count": 3}, out=tmp_path / "run")


def test_other_folders_are_not_touched(small: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(RunError, match="not empty and holds no run"):
        fedcustom.run(small, out=tmp_path / "mine")
    with pytest.raises(RunError, match="is a file"):
        fedcustom.run(small, out=tmp_path / "mine" / "letter.txt")


KV = {"method.kind": "kv"}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({**KV, "method.length": 64}, ModelError, r"method.length = 64: .* has a context of 64 positions"),
        (
            {**KV, "method.length": 60},
            ModelError,
            r"data.max_length = 24: .*84 positions are needed; .* has 64",
        ),
        ({"model.base": "builtin:minilmm"}, ModelError, r"no built-in model.*did you mean 'builtin:minilm'"),
        ({"model.base": "./nowhere"}, ModelError, "no folder ./nowhere"),
        ({"model.base": "nobody/nothing"}, ModelError, "cannot load nobody/nothing"),
        ({"model.device": "gpu"}, ModelError, "model.device: 'gpu' cannot be used"),
        (
            {"data.task": "generation", "data.max_target_length": 8},
            ModelError,
            "is an encoder and cannot generate",
        ),
        ({"rounds.clients_per_round": 5}, RecipeError, r"rounds.clients_per_round = 5: there are 4 clients"),
        ({"rounds.min_clients": 5}, RecipeError, r"rounds.min_clients = 5: there are 4 clients"),
        (
            {"clients.development_fraction": 0.0},
            RecipeError,
            "leaves no development examples; name data.development",
        ),
        ({"data.label": "lable"}, DataError, "did you mean 'label'"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(
    small: dict[str, Any], tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        fedcustom.run(small, change, out=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_empty_client_is_named(small: dict[str, Any]) -> None:
    recipe = resolved(load_recipe(small))
    data = build_data(recipe.data, recipe.clients, 0)
    method = make_method(recipe, load_base(recipe.model, data.task, 0))
    client = fedcustom.methods.Client("hollow", type(data.clients["site-0"])("hollow", []))
    with pytest.raises(DataError, match="client 'hollow' has no examples to train on"):
        method.execute(method.configure(method.initialise(), 1, {"hollow": Work(epochs=1)})["hollow"], client)


def test_bfloat16_trains_float32_adapters_on_a_bfloat16_base(small: dict[str, Any], tmp_path: Path) -> None:
    run = fedcustom.run({**small, "model": {**small["model"], "dtype": "bfloat16"}}, out=tmp_path / "half")
    plain = fedcustom.run(small, out=tmp_path / "single")
    assert {tensor.dtype for tensor in tensors_of(run.directory).values()} == {torch.float32}
    first, second = (rows_of(r.directory)[1]["train_loss"] for r in (run, plain))
    assert first == pytest.approx(second, rel=0.02)
    assert first != second
    assert json.loads((run.directory / "environment.json").read_text())["precision"] == "bfloat16"


def test_best_is_chosen_on_development_and_kept(small: dict[str, Any], tmp_path: Path) -> None:
    run = fedcustom.run(
        small,
        {"rounds.count": 5, "training.learning_rate": 0.3, "evaluation.metric": "loss"},
        out=tmp_path / "run",
    )
    rows = rows_of(run.directory)[1:]
    best = min(rows, key=lambda row: row["development"]["loss"])
    assert run.summary["best_round"] == best["round"]
    assert Checkpoints(run.directory / "checkpoints").rounds() == sorted({best["round"], 5})
    assert is_better(best["development"]["loss"], rows[-1]["development"]["loss"] + 1e-12, "loss")


def test_predictions_of_a_loaded_run_are_those_of_its_evaluation(
    small: dict[str, Any], tmp_path: Path
) -> None:
    fedcustom.run(small, out=tmp_path / "run")
    run = fedcustom.load(tmp_path / "run")
    lines = [json.loads(line) for line in (run.directory / "predictions.jsonl").read_text().splitlines()]
    answers = run.predict([line["text"] for line in lines])
    assert [answer["label"] for answer in answers] == [line["prediction"] for line in lines]
    for answer, line in zip(answers, lines, strict=True):
        assert answer["probability"] == pytest.approx(line["probability"], abs=1e-4)
        assert sum(answer["probabilities"].values()) == pytest.approx(1)
    (row,) = run.predict([{"text": lines[0]["text"], "more": 1}])
    assert row["probabilities"] == pytest.approx(answers[0]["probabilities"])
    with pytest.raises(DataError, match="input 1: no column 'text'"):
        run.predict([{"txt": "x"}])
    assert run.predict([]) == []


def test_auto_says_which_precision_it_chose(small: dict[str, Any], tmp_path: Path) -> None:
    notes: list[str] = []

    class Noting(Callback):
        def on_note(self, text: str) -> None:
            notes.append(text)

    recipe = load_recipe(small, {"model.dtype": "auto", "rounds.count": 1})
    run_recipe(recipe, tmp_path / "run", callbacks=[Noting()])
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["precision_seconds"].keys() == {"float32", "bfloat16"}
    assert any(text.startswith(f"model.dtype = auto: {environment['precision']}") for text in notes)


def test_one_answer_at_a_time_is_held_while_a_round_is_merged(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server merges large models from many sites; what each sends must be gone when the next one comes."""
    given = InProcessTransport.exchange
    held: list[list[bool]] = []

    def watched(self: InProcessTransport, *arguments: Any) -> Iterator[Reply]:
        seen: list[weakref.ref[torch.Tensor]] = []
        for reply in list(given(self, *arguments)):
            tensors = {name: tensor.clone() for name, tensor in reply.update.tensors.items()}
            held.append([ref() is not None for ref in seen])
            seen.append(weakref.ref(next(iter(tensors.values()))))
            passed = [replace(reply, update=replace(reply.update, tensors=tensors))]
            del tensors, reply
            yield passed.pop()

    monkeypatch.setattr(InProcessTransport, "exchange", watched)
    fedcustom.run({**small, "method": {"name": "full"}}, out=tmp_path / "run")
    assert max(map(len, held)) >= 2
    assert not any(any(row) for row in held)
