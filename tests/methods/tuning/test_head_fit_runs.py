"""Whole runs in which clients fit the head: what travels, what is kept, and what interrupts them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fedcustom
from fedcustom.core.errors import RecipeError
from fedcustom.core.tensors import Tensors, equal
from fedcustom.federated.callbacks import Callback
from fedcustom.federated.evaluator import Evaluator
from fedcustom.federated.run_directory import Checkpoints
from fedcustom.methods import State
from fedcustom.methods.tuning.head_client import HeadClient
from fedcustom.methods.tuning.head_messages import TEMPERATURES
from fedcustom.recipe.recipe import load_recipe
from helpers.head_fit import LABELS, WIDTH
from helpers.runs import rows_of, tensors_of, without_seconds

FIRST: dict[str, Any] = {"training.fit_head_rounds": [1], "evaluation.select": "last"}
RESTS: dict[str, Any] = {**FIRST, "training.freeze_head_rounds": 9}
"""The head of round 1 is that of the end."""


def state_of(directory: Path, number: int) -> State:
    return Checkpoints(directory / "checkpoints").load(number).state


def head_of(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if "classifier" in name}


@pytest.mark.parametrize("compressed", [False, True])
def test_a_whole_run(small: dict[str, Any], tmp_path: Path, compressed: bool) -> None:
    """All four clients are asked where a round has two, and what they send travels as it is."""
    recipe = {**small, "rounds": {"count": 3, "clients_per_round": 2, "checkpoint_every": 1}}
    overrides: dict[str, Any] = {
        "training.fit_head_rounds": [1, -1], "training.fit_head_steps": 3, "evaluation.select": "last",
    }  # fmt: skip
    if compressed:
        overrides |= {"compression.kind": "int8", "compression.down": True}
    run = fedcustom.run(recipe, overrides, out=tmp_path / "run")
    rows = rows_of(run.directory)[1:]
    assert [len(row["answered"]) for row in rows] == [4, 2, 4]
    assert [row["train_loss"] is None for row in rows] == [True, False, True]
    head = LABELS * (WIDTH + 1)
    numbers = LABELS + LABELS * WIDTH + WIDTH * (WIDTH + 1) // 2 + len(TEMPERATURES) + 3 * head
    for row in (rows[0], rows[2]):
        assert max(row["bytes_up"].values()) == pytest.approx(4 * numbers, abs=1200)  # five messages' forms
        assert row["method"]["head"].startswith("fitted to 144 examples of 4 clients")
    state = state_of(run.directory, 3).tensors
    down = 4 * (sum(t.numel() for t in state.values()) + 4 * head)
    if not compressed:
        forms = 900 + sum(len(name) + 75 for name in state)  # of the messages, and the state's names
        assert max(rows[0]["bytes_down"].values()) == pytest.approx(down, abs=forms)


def test_compression_leaves_the_fit_as_it_is(small: dict[str, Any], tmp_path: Path) -> None:
    heads = []
    for kind in ("none", "int4"):
        overrides = {**RESTS, "compression.kind": kind, "compression.down": kind != "none"}
        run = fedcustom.run(small, overrides, out=tmp_path / kind)
        heads.append(head_of(state_of(run.directory, 2).tensors))
    assert len(heads[0]) == 2
    assert equal(*heads)


class _Interrupted(Callback):
    """Stops a run as Ctrl-C does, once a round has begun for good."""

    def __init__(self, at: str) -> None:
        self.at = at

    def on_phase(self, text: str, done: int = 0, of: int = 0) -> None:
        if text.startswith(self.at) and done == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", ["round 1 of 4, fitting", "round 2 of 4, training", "round 4 of 4, fitting"])
def test_a_resumed_run_comes_to_the_same_bits(small: dict[str, Any], tmp_path: Path, at: str) -> None:
    overrides = {"training.fit_head_rounds": [1, -1], "rounds.count": 4}
    whole = fedcustom.run(small, overrides, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fedcustom.run(small, overrides, out=tmp_path / "run", callbacks=[_Interrupted(at)])
    again = fedcustom.run(small, overrides, out=tmp_path / "run", resume=True)
    assert equal(tensors_of(again.directory), tensors_of(whole.directory))
    rows, expected = rows_of(again.directory), rows_of(whole.directory)
    assert list(map(without_seconds, rows)) == list(map(without_seconds, expected))
    assert again.summary["temperature"] == whole.summary["temperature"]


def failing(monkeypatch: pytest.MonkeyPatch, fails: Callable[[str, str], bool]) -> None:
    """Let clients that ``fails`` names, given the kind of task, have lost their vectors."""
    work = HeadClient.execute

    def sometimes(self: HeadClient, task: Any, name: str, *rest: Any) -> Any:
        if fails(task.kind, name):
            self.rows.pop(name, None)
        return work(self, task, name, *rest)

    monkeypatch.setattr(HeadClient, "execute", sometimes)


def test_a_client_that_was_started_anew_is_left_out(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, lambda kind, name: kind == "head gradient" and name == "site-2")
    run = fedcustom.run(small, FIRST, out=tmp_path / "run")
    row = rows_of(run.directory)[1]
    assert row["answered"] == ["site-0", "site-1", "site-3"]
    assert row["left_out"] == {"site-2": "the vectors of this round are gone: this client was started anew"}
    assert "kept" not in row["method"]["head"]
    assert row["bytes_down"]["site-2"] < row["bytes_down"]["site-1"]


def test_a_fit_that_few_go_on_with_keeps_the_discriminant(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, lambda kind, name: kind == "head gradient" and name != "site-1")
    run = fedcustom.run(small, FIRST, out=tmp_path / "run")
    row = rows_of(run.directory)[1]
    assert row["answered"] == ["site-1"]
    assert row["method"]["head"].endswith("; 1 of 4 clients went on; kept the discriminant")


def test_a_fit_that_nobody_goes_on_with_keeps_the_discriminant(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, lambda kind, name: kind == "scale head")
    run = fedcustom.run(small, FIRST, out=tmp_path / "run")
    row = rows_of(run.directory)[1]
    assert row["answered"] == []
    assert len(row["left_out"]) == 4
    assert row["method"]["head"].endswith("; 0 of 4 clients went on; kept the discriminant")


@pytest.mark.parametrize(
    ("said", "metric", "kept"),
    [
        ([0.5, 0.5, 0.6, 0.5, 0.6, 0.6], "accuracy", "the logistic regression"),
        ([0.5, 0.5, 0.6, 0.6, 0.7, 0.6], "accuracy", "the discriminant"),
        ([0.5, 0.5, 0.6, 0.7, 0.6, 0.6], "accuracy", "as it was"),
        ([0.5, 0.5, 0.6, 0.5, 0.6, 0.7], "loss", "as it was"),
        ([0.5, 0.5, 0.6, 0.7, 0.5, 0.6], "loss", "the discriminant"),
    ],
)
def test_a_fit_is_kept_where_the_development_score_does_not_fall(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[float], metric: str,
    kept: str,
) -> None:  # fmt: skip
    """Round 1 compares discriminant and logistic regression, the last one the former head as well."""
    scores, seen = iter(said), []

    def development(self: Evaluator, state: State) -> dict[str, float]:
        score = next(scores)
        seen.append(head_of(state.tensors))
        return {"accuracy": 0.5, "loss": 0.5, metric: score}

    monkeypatch.setattr(Evaluator, "development", development)
    overrides = {"training.fit_head_rounds": [1, -1], "rounds.count": 3, "rounds.checkpoint_every": 1,
                 "evaluation.untuned": False, "evaluation.metric": metric}  # fmt: skip
    run = fedcustom.run(small, overrides, out=tmp_path / "run")
    assert len(seen) == len(said)
    row, last = rows_of(run.directory)[-1], state_of(run.directory, 3)
    # Scored: two of round 1, round 2, then the candidates of round 3.
    before, discriminant, logistic = (seen[3 + at] for at in range(3))
    expected = {"as it was": before, "the discriminant": discriminant, "the logistic regression": logistic}
    assert equal(head_of(last.tensors), expected[kept])
    assert ("kept" in row["method"]["head"]) == (kept != "the logistic regression")
    if kept != "the logistic regression":
        assert f"; kept {kept} (development {metric} of candidates: " in row["method"]["head"]
    assert "unfinished" not in last.values
    assert last.values["label_counts"]


def test_a_head_that_is_fitted_alone_never_trains(small: dict[str, Any], tmp_path: Path) -> None:
    overrides = {**RESTS, "evaluation.calibrate": False}
    heads = []
    for rounds in (2, 3):
        run = fedcustom.run(small, {**overrides, "rounds.count": rounds}, out=tmp_path / str(rounds))
        heads.append(head_of(load_file(run.directory / "model" / "model.safetensors")))
    assert heads[0]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])


def test_poisoned_examples_have_sums_like_others(small: dict[str, Any], tmp_path: Path) -> None:
    overrides = {**FIRST, "attack.kind": "label_flip", "attack.fraction": 0.5, "attack.boost": 3.0}
    run = fedcustom.run(small, overrides, out=tmp_path / "run")
    assert [len(row["answered"]) for row in rows_of(run.directory)[1:]] == [4, 4]


def test_baselines(small: dict[str, Any], tmp_path: Path) -> None:
    """Centralised, the sums are one client's; locally each client has a head of its own."""
    for baseline in ("centralised", "local"):
        run = fedcustom.run(small, {**FIRST, "baseline": baseline}, out=tmp_path / baseline)
        assert [row["train_loss"] is None for row in rows_of(run.directory)[1:]] == [True, False]
        assert run.summary["bytes"]["up_total"] == 0


def test_the_centralised_head_is_the_federated_one(small: dict[str, Any], tmp_path: Path) -> None:
    """Of clients that have few of each other's labels."""
    skewed = {**small, "clients": {"partition": "dirichlet", "alpha": 0.3, "count": 4}}
    overrides = {**RESTS, "training.fit_head_steps": 500, "training.fit_head_c": 1.0}
    overrides["training.fit_head_least_texts"] = 1
    heads = []
    for baseline in ("federated", "centralised"):
        run = fedcustom.run(skewed, {**overrides, "baseline": baseline}, out=tmp_path / baseline)
        heads.append(head_of(state_of(run.directory, 2).tensors))
    for name, tensor in heads[0].items():
        torch.testing.assert_close(tensor, heads[1][name], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"training.fit_head_rounds": [0]},
            r"_rounds = \[0\]: must be different rounds from 1 to .* 20",
        ),
        ({"training.fit_head_rounds": [1, 1]}, "must be different rounds"),
        ({"training.fit_head_rounds": [-1, 20]}, "must be different rounds"),
        ({"training.fit_head_rounds": [-2]}, "or -1"),
        ({"training.freeze_head_rounds": 20}, "or the head fitted"),
        ({"training.fit_head_rounds": [1], "rounds.count": 1}, "leaves no round"),
        ({"training.fit_head_rounds": [1], "aggregation.rule": "median"}, "needs aggregation.rule = 'mean'"),
        ({"training.fit_head_rounds": [1], "aggregation.correction": "feddyn"}, "correction = 'none'"),
        ({"training.fit_head_rounds": [1], "participation.buffer": 2}, "participation.buffer"),
        ({"training.fit_head_rounds": [1], "personalisation.keep": ["head"]}, r"keep = \['head'\]"),
        (
            {"training.fit_head_rounds": [1], "attack.kind": "alie"},
            "'alie' is defined for changes, not",
        ),
        (
            {"training.fit_head_rounds": [1], "method.name": "lora", "method.variant": "rolora"},
            "'rolora' needs every round",
        ),
        ({"training.fit_head_rounds": [1], "data.task": "generation"}, "needs labels"),
        ({"training.fit_head_steps": -1}, "fit_head_steps = -1: .*greater than or equal to 0"),
        ({"training.fit_head_c": 0}, "fit_head_c = 0: .*greater than 0"),
    ],
)
def test_bad_input(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe({}, overrides)


def test_a_bias_that_stays_with_its_client(small: dict[str, Any], tmp_path: Path) -> None:
    overrides = {**FIRST, "personalisation.keep": ["classifier.bias"]}
    with pytest.raises(RecipeError, match="a head that stays with the clients"):
        fedcustom.run(small, overrides, out=tmp_path / "run")
