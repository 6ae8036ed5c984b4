"""Malicious clients that answer in form: what they send is refused, and the run goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedcustom.core.errors import RecipeError, RunError
from fedcustom.federated.run import run_recipe
from fedcustom.methods import Update
from fedcustom.methods.tuning.messages import TrainUpdate
from fedcustom.recipe.recipe import load_recipe
from fedcustom.updates.transform import ClientContext, UpdateTransform
from helpers.runs import rows_of, tensors_of


class Poison(UpdateTransform):
    """The first client's change becomes one value, or what it says of its work."""

    name = "poison"
    may_be_skipped = True  # clients that fit the head do so honestly

    def __init__(self, value: float | None = None, since: int = 1, **claims: Any) -> None:
        self.value, self.since, self.claims = value, since, claims

    def on_client(self, update: Update, context: ClientContext) -> Update:
        malicious = context.client == "site-0" and context.round_number >= self.since
        if not malicious or not isinstance(update, TrainUpdate):
            return update
        if self.value is not None:
            filled = {name: torch.full_like(t, self.value) for name, t in update.tensors.items()}
            update = replace(update, tensors=filled)
        return replace(update, **self.claims)


def run(recipe: dict[str, Any], folder: Path, poison: UpdateTransform, **more: Any) -> list[dict[str, Any]]:
    overrides = {key.replace("__", "."): value for key, value in more.items()}
    checked = load_recipe({**recipe, "rounds": {"count": 3}}, overrides)
    run_recipe(checked, folder, transforms=[poison])
    return rows_of(folder)


@pytest.mark.parametrize("value", [1e4, 1e20, 3.4e38])
@pytest.mark.parametrize(("aggregation", "since"), [
    ({"rule": "mean"}, 1),
    ({"rule": "geometric_median"}, 2),
    ({"rule": "mean", "server_optimizer": "fedadam"}, 1),
])  # fmt: skip
def test_a_change_that_is_far_too_large_is_left_out(
    small: dict[str, Any], tmp_path: Path, value: float, aggregation: dict[str, Any], since: int
) -> None:
    rows = run({**small, "aggregation": aggregation}, tmp_path, Poison(value, since))
    for row in rows[1:]:
        assert ("site-0" in row["left_out"]) == (row["round"] >= since)
        assert "its change has norm" in "".join(row["left_out"].values()) or row["round"] < since
        assert len(row["answered"]) == len(row["cohort"]) - (row["round"] >= since)
        assert row["norms"].keys() == set(row["answered"])
    assert all(torch.isfinite(tensor).all() for tensor in tensors_of(tmp_path).values())


def test_who_is_left_out_for_its_norm_did_not_answer(small: dict[str, Any], tmp_path: Path) -> None:
    rows = run(small, tmp_path, Poison(1e20))
    assert rows[-1]["train_loss"] is not None
    assert "site-0" not in rows[-1]["answered"]


@pytest.mark.parametrize("claims", [
    *({"steps": 1}, {"steps": 10**6}, {"examples": 10**400}, {"examples": 0}),
    *({"loss": float("nan")}, {"weight": 0.0}),
])  # fmt: skip
def test_claims_that_the_task_does_not_allow_are_left_out(
    small: dict[str, Any], tmp_path: Path, claims: dict[str, Any]
) -> None:
    rows = run(small, tmp_path, Poison(None, **claims), training__batch_size=4, aggregation__rule="fednova")
    assert all(list(row["left_out"]) == ["site-0"] for row in rows[1:])


class Overflow(UpdateTransform):
    """An aggregate that is not finite, as a rule or a server optimiser may give one; in one round."""

    name = "overflow"

    def on_aggregate(self, delta: Any, context: Any) -> Any:
        if context.round_number == 2:
            return {name: torch.full_like(tensor, torch.inf) for name, tensor in delta.items()}
        return delta


def test_an_aggregate_that_cannot_be_trained_from_is_refused_and_the_run_goes_on(
    small: dict[str, Any], tmp_path: Path
) -> None:
    rows = run(small, tmp_path, Overflow())
    assert "not finite" in rows[2]["refused"]
    assert "refused" not in rows[3]
    assert rows[2]["development"] == rows[1]["development"]
    assert "round 2: refused, the state stays that of round 1" in (tmp_path / "warnings.log").read_text()
    assert all(torch.isfinite(tensor).all() for tensor in tensors_of(tmp_path).values())


def test_limits_are_settings(small: dict[str, Any], tmp_path: Path) -> None:
    rows = run(small, tmp_path / "wide", Poison(50.0), aggregation__max_norm_ratio=1e9)
    assert all(not row["left_out"] for row in rows[1:])
    with pytest.raises(RunError, match=r"at most 1e-09 is allowed \(aggregation.max_norm\)"):
        run(small, tmp_path / "narrow", Poison(), aggregation__max_norm=1e-9)
    with pytest.raises(RecipeError, match="max_norm_ratio"):
        load_recipe(small, {"aggregation.max_norm_ratio": 0.5})
