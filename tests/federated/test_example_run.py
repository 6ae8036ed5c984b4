"""Runs whose clients hide their training rows: the record, what is spent, and what is withheld."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fedcustom
from fedcustom.core.errors import RecipeError
from fedcustom.core.tensors import equal
from fedcustom.federated.private_run import RECORD
from fedcustom.federated.run_directory import Checkpoints
from fedcustom.privacy.accounting import Event, Ledger
from helpers.runs import StopAt, rows_of


@pytest.fixture
def hidden(small: dict[str, Any]) -> dict[str, Any]:
    """Three rounds of two of four clients, drawn by the seed."""
    return {
        **small,
        "training": {"batch_size": 8, "learning_rate": 0.01, "local_steps": 3},
        "rounds": {"count": 3, "clients_per_round": 2},
        "evaluation": {"batch_size": 32, "untuned": False},
        "privacy": {"unit": "example", "noise_multiplier": 0.8, "delta": 1e-3},
    }


def record_of(out: Path) -> Any:
    return json.loads((out / RECORD).read_text())


def last_state(run: fedcustom.Run) -> dict[str, Any]:
    return Checkpoints(run.directory / "checkpoints").load(3).state.tensors


def test_the_record_and_what_was_spent(hidden: dict[str, Any], tmp_path: Path) -> None:
    run = fedcustom.run(hidden, out=tmp_path / "run")
    record, rows = record_of(tmp_path / "run"), rows_of(run.directory)
    turns: dict[str, int] = {}
    for row in rows:
        for name in row["answered"]:
            turns[name] = turns.get(name, 0) + 1
    assert {name: client["steps"] for name, client in record["clients"].items()} == {
        name: 3 * count for name, count in turns.items()
    }
    epsilons = []
    for client in record["clients"].values():
        event = Event(0.8, client["steps"], 8 / client["rows"])
        epsilons.append(Ledger((event,)).epsilon(1e-3))
        assert client["planned_epsilon"] == client["epsilon"] == pytest.approx(epsilons[-1])
    spread = record["over_clients"]["epsilon"]
    assert (spread["min"], spread["max"]) == (pytest.approx(min(epsilons)), pytest.approx(max(epsilons)))
    assert record["epsilon"] == pytest.approx(max(epsilons))
    assert (record["unit"], record["noise"], record["valid"]) == ("example", "site", True)
    assert record["never_promised"]
    assert record["withheld"] == ["training losses"]
    assert rows[-1]["epsilon"] == pytest.approx(max(epsilons), rel=1e-4)
    assert [row["epsilon"] for row in rows] == sorted(row["epsilon"] for row in rows)
    assert all(row["train_loss"] is None for row in rows)
    assert all(row["examples"] == 2 * 3 * 8 for row in rows)


def test_hidden_rows_are_added_up_by_secure_sums_without_a_loss(
    hidden: dict[str, Any], tmp_path: Path
) -> None:
    hidden["rounds"] = {"count": 2, "clients_per_round": 4}
    hidden["privacy"]["randomness"] = "seeded"
    hidden["aggregation"] = {"weighting": "uniform"}
    hidden["training"]["fit_head"] = False
    plain = fedcustom.run(hidden, out=tmp_path / "plain")
    summed = fedcustom.run({**hidden, "secure_sum": {"on": True}}, out=tmp_path / "summed")
    for row in rows_of(summed.directory):
        assert len(row["answered"]) == 4
        assert row.get("train", {}).get("loss") is None
    ours, theirs = (
        Checkpoints(run.directory / "checkpoints").load(2).state.tensors for run in (summed, plain)
    )
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, atol=1e-4), name


def test_secret_noise_differs_and_seeded_noise_is_resumed(hidden: dict[str, Any], tmp_path: Path) -> None:
    """A run with secret noise has another state each time; one with seeded noise is the same, resumed too,
    and not valid.
    """
    secret = [last_state(fedcustom.run(hidden, out=tmp_path / name)) for name in ("one", "two")]
    assert not equal(*secret)
    seeded = {**hidden, "privacy": {**hidden["privacy"], "randomness": "seeded"}}
    whole = last_state(fedcustom.run(seeded, out=tmp_path / "three"))
    with pytest.raises(RuntimeError, match="stopped"):
        fedcustom.run(seeded, out=tmp_path / "four", callbacks=[StopAt(2)])
    assert record_of(tmp_path / "four")["over_clients"]["epsilon"]["max"] == 0  # as it began
    again = fedcustom.run(seeded, out=tmp_path / "four", resume=True)
    assert equal(whole, last_state(again))
    assert record_of(tmp_path / "four") == record_of(tmp_path / "three")
    assert record_of(tmp_path / "four")["valid"] is False


def test_each_client_is_calibrated_and_epsilon_does_not_add(hidden: dict[str, Any], tmp_path: Path) -> None:
    privacy = {"unit": "example", "epsilon": 3.0, "delta": 1e-3}
    fedcustom.run({**hidden, "privacy": privacy}, out=tmp_path / "run")
    record = record_of(tmp_path / "run")
    assert record["over_clients"]["planned_epsilon"] == {"min": 3.0, "median": 3.0, "max": 3.0}
    assert record["epsilon"] == 3.0
    for client in record["clients"].values():
        event = Event(client["noise_multiplier"], client["planned_steps"], client["sampling"])
        assert 2.97 < Ledger((event,)).epsilon(1e-3) <= 3.0


@pytest.fixture
def fitting(hidden: dict[str, Any]) -> dict[str, Any]:
    """The same, whose head is fitted first."""
    more = {"fit_head_rounds": [1], "head_learning_rate": 0.01}
    return {
        **hidden,
        "model": {**hidden["model"], "pooling": "mean", "normalize": True},
        "training": hidden["training"] | more,
    }


def test_a_head_is_fitted_within_epsilon(fitting: dict[str, Any], tmp_path: Path) -> None:
    """By all clients in the first round; with the steps it spends epsilon, in the first round its own."""
    fitting["privacy"] = {"unit": "example", "epsilon": 3.0, "delta": 1e-3, "head_share": 0.2}
    fitting["rounds"] = {"count": 3}
    run = fedcustom.run(fitting, out=tmp_path / "run")
    record, rows = record_of(tmp_path / "run"), rows_of(run.directory)
    assert record["epsilon"] == 3.0
    for client in record["clients"].values():
        assert client["planned_head_fits"] == client["head_fits"] == 1
        assert client["planned_steps"] == client["steps"] == 6
        head = Event(client["head_noise_multiplier"])
        whole = Ledger((head, Event(client["noise_multiplier"], 6, client["sampling"])))
        assert 2.97 < whole.epsilon(1e-3) <= 3.0
        assert rows[0]["epsilon"] == pytest.approx(Ledger((head,)).epsilon(1e-3), rel=1e-4)
    assert "noised sums of 4 clients" in rows[0]["method"]["head"]
    assert rows[0]["epsilon"] < rows[1]["epsilon"] < rows[2]["epsilon"] == 3.0
    assert not [
        name for name in Checkpoints(run.directory / "checkpoints").load(3).state.server if "label" in name
    ]


def test_a_run_with_a_fitted_head_is_resumed(fitting: dict[str, Any], tmp_path: Path) -> None:
    """From after the fit, which is not spent again."""
    fitting["privacy"]["randomness"] = "seeded"
    whole = last_state(fedcustom.run(fitting, out=tmp_path / "one"))
    with pytest.raises(RuntimeError, match="stopped"):
        fedcustom.run(fitting, out=tmp_path / "two", callbacks=[StopAt(2)])
    assert equal(whole, last_state(fedcustom.run(fitting, out=tmp_path / "two", resume=True)))
    assert record_of(tmp_path / "two") == record_of(tmp_path / "one")
    assert all(client["head_fits"] == 1 for client in record_of(tmp_path / "two")["clients"].values())


def test_a_head_on_vectors_of_any_length_is_refused_before_the_model(
    fitting: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any
) -> None:
    from fedcustom.recipe.recipe import load_recipe, to_toml

    monkeypatch.setattr("fedcustom.federated.simulation.load_for", None)
    fitting["model"]["normalize"] = False
    with pytest.raises(RecipeError, match=r"set model\.normalize = true, or fit_head_rounds"):
        fedcustom.run(fitting, out=tmp_path / "run")
    (tmp_path / "recipe.toml").write_text(to_toml(load_recipe(fitting)))
    said = command("privacy", tmp_path / "recipe.toml")
    assert said.code == 2
    assert "model.normalize" in said.error


def test_the_command_says_what_the_head_spends(fitting: dict[str, Any], tmp_path: Path, command: Any) -> None:
    from fedcustom.recipe.recipe import load_recipe, to_toml

    (tmp_path / "recipe.toml").write_text(to_toml(load_recipe(fitting)))
    said = command("privacy", tmp_path / "recipe.toml")
    assert said.code == 0, said
    assert "counts and sums of vectors of length 1 by label once" in said.out
    told = json.loads(command("privacy", tmp_path / "recipe.toml", "--json").out)
    assert all(client["planned_head_fits"] == 1 for client in told["clients"].values())


def test_a_delta_too_large_is_refused_before_the_model(
    hidden: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedcustom.federated.simulation.load_for", None)
    hidden["privacy"]["delta"] = 0.01
    with pytest.raises(RecipeError, match=r"privacy.delta = 0.01: at most 1 / \(10 rows\)"):
        fedcustom.run(hidden, out=tmp_path / "run")


def test_the_command_says_what_is_promised(
    hidden: dict[str, Any], tmp_path: Path, command: Any, tiny: dict[str, str]
) -> None:
    from fedcustom.recipe.recipe import load_recipe, to_toml

    (tmp_path / "recipe.toml").write_text(to_toml(load_recipe(hidden)))
    said = command("privacy", tmp_path / "recipe.toml")
    assert said.code == 0
    assert "for each training row of each client" in said.out
    assert "noise of 0.8 times the bound" in said.out
    told = json.loads(command("privacy", tmp_path / "recipe.toml", "--json").out)
    assert told["clients"].keys()
    assert told["over_clients"]["epsilon"]["max"] == 0
