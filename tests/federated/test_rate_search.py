"""A learning rate that the federation chooses itself, before training begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fedcustom
from fedcustom.core.errors import RecipeError
from fedcustom.core.files import read_json
from fedcustom.federated.resolve import resolved
from fedcustom.federated.summary import PHASES
from fedcustom.recipe.recipe import load_recipe
from helpers.runs import rows_of

RATES = [0.001, 0.01, 0.03, 0.1]
FITTED: dict[str, Any] = {"training.fit_head_rounds": [1, -1], "training.logit_adjustment": 0.0}
ROUNDS: dict[str, Any] = {"rounds.count": 9, "rounds.clients_per_round": 2, "evaluation.metric": "loss"}


def developed(recipe: dict[str, Any], rate: float, out: Path) -> list[float]:
    """The development loss after each round of a plain run at this rate."""
    run = fedcustom.run(recipe, {**FITTED, **ROUNDS, "training.learning_rate": rate}, out=out)
    return [row["development"]["loss"] for row in rows_of(run.directory)]


@pytest.mark.slow
def test_trials_are_the_first_rounds_of_runs_at_their_rates(small: dict[str, Any], tmp_path: Path) -> None:
    """Two training rounds each, and four more for the better two; then the run goes on at the best."""
    recipe = {**small, "method": {"name": "bitfit"}}
    curves = {rate: developed(recipe, rate, tmp_path / f"{rate}") for rate in RATES}
    searched = {**FITTED, **ROUNDS, "training.search_rates": RATES, "training.learning_rate": 0.01}
    run = fedcustom.run(recipe, searched, out=tmp_path / "searched")
    found = run.summary["search"]
    assert found == read_json(run.directory / "search.json")
    two = {rate: curve[3] for rate, curve in curves.items()}  # rounds 0, and 1, which fits the head
    better = sorted(two, key=lambda rate: two[rate])[:2]
    six = {rate: curves[rate][7] for rate in better}
    for trial in found["trials"]:
        expected = (two if trial["rounds"] == 2 else six)[trial["learning_rate"]]
        assert trial["score"] == pytest.approx(expected, rel=1e-4)
    assert [trial["rounds"] for trial in found["trials"]] == [2, 2, 2, 2, 6, 6]
    assert found["learning_rate"] == min(six, key=lambda rate: six[rate])
    rows = rows_of(run.directory)
    assert rows[2]["learning_rate"] == found["learning_rate"]
    assert [row["development"]["loss"] for row in rows] == pytest.approx(
        curves[found["learning_rate"]], rel=1e-4
    )
    sent = sum(sum(row["bytes_up"].values()) for row in rows[1:])
    assert run.summary["bytes"]["up_total"] == sent + found["bytes_up"]
    assert found["bytes_up"] > 0
    assert found["seconds"] > 0
    assert all(run.summary["seconds"][phase] >= 0 for phase in PHASES)


def test_auto_tries_four_rates_around_the_methods_own(small: dict[str, Any]) -> None:
    recipe = load_recipe({**small, "method": {"name": "lora"}}, {"training.learning_rate": "auto"})
    training = resolved(recipe).training
    assert training.learning_rate == pytest.approx(training.search_rates[1])  # type: ignore[index]
    ratios = [rate / training.learning_rate for rate in training.search_rates or []]  # type: ignore[operator]
    assert ratios == pytest.approx([0.3, 1, 3, 10])
    assert resolved(resolved(recipe)) == resolved(recipe)
    other = recipe.for_method("bitfit")
    assert other.training.learning_rate == "auto"
    assert resolved(other).training.search_rates != training.search_rates


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"training.learning_rate": "often"}, "training.learning_rate"),
        ({"training.learning_rate": 0}, "greater than 0"),
        ({"training.search_rates": [0.1]}, "search_rates"),
        ({"training.search_rates": [0.1, -0.1]}, "search_rates"),
        ({"training.search_rates": []}, "search_rates"),
        (
            {"training.learning_rate": "auto", "participation.buffer": 2},
            "'auto': does not go with participation.buffer",
        ),
        ({"training.learning_rate": "auto", "method.name": "prompt_engineering"}, "learning_rate"),
    ],
)
def test_bad_input(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe({}, overrides)
