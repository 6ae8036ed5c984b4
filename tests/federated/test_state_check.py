"""The check of an aggregate, and what becomes of a round whose aggregate does not pass it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedcustom.core.errors import AggregationError
from fedcustom.core.files import read_json
from fedcustom.federated.run import run_recipe
from fedcustom.federated.state_check import check_aggregate
from fedcustom.methods import State
from fedcustom.recipe.recipe import load_recipe
from fedcustom.updates.transform import UpdateTransform
from helpers.runs import rows_of


@pytest.mark.parametrize(
    "state",
    [
        State({"w": torch.tensor([torch.nan])}),
        State({}, {"moment": torch.tensor([torch.inf])}),
        State({}, {}, {"sigma": float("nan")}),
        State({}, {}, {"tallies": {"0": [3, 1.0, -2e30]}}),
        State({}, {}, {"round": 2**63}),
    ],
)
def test_a_state_that_cannot_be_sent_is_refused(state: State) -> None:
    with pytest.raises(AggregationError, match="the aggregate"):
        check_aggregate(state)


def test_texts_are_no_matter() -> None:
    check_aggregate(State({"w": torch.ones(2)}, {}, {"queries": ["a"], "on": True}))


class Overflow(UpdateTransform):
    """Every aggregate of a high rate overflows, as a poisoned one may."""

    name = "overflow"
    may_be_skipped = True

    def on_aggregate(self, delta: Any, context: Any) -> Any:
        return {name: torch.full_like(tensor, torch.inf) for name, tensor in delta.items()}


def test_a_search_of_rates_goes_on_after_a_trial_that_fails(small: dict[str, Any], tmp_path: Path) -> None:
    """A trial whose aggregate is refused is a rate that failed; where all do, an error says so."""

    class Once(Overflow):
        calls = 0

        def on_aggregate(self, delta: Any, context: Any) -> Any:
            self.calls += 1
            return super().on_aggregate(delta, context) if self.calls == 1 else delta

    recipe = load_recipe(
        {**small, "rounds": {"count": 2}},
        {"training.search_rates": [0.001, 0.01], "training.learning_rate": 0.01},
    )
    summary = run_recipe(recipe, tmp_path, transforms=[Once()])
    assert summary["search"]["trials"][0]["score"] is None
    assert summary["search"]["learning_rate"] == 0.01
    assert len(rows_of(tmp_path)) == 3


def test_a_refused_round_reports_nothing(small: dict[str, Any], tmp_path: Path) -> None:
    """A method's report is of the round that it made; it is no part of the state, or of a checkpoint."""

    class InRoundTwo(Overflow):
        def on_aggregate(self, delta: Any, context: Any) -> Any:
            return super().on_aggregate(delta, context) if context.round_number == 2 else delta

    changes = {"method": {"name": "lora", "rank": 2}, "rounds": {"count": 3, "checkpoint_every": 1}}
    recipe = load_recipe({**small, **changes}, {"training.fit_head": False})
    run_recipe(recipe, tmp_path, transforms=[InRoundTwo()])
    first, second, third = rows_of(tmp_path)[1:]
    assert "refused" in second
    assert [row.get("method", {}).keys() for row in (first, second, third)] == [
        {"aggregation_error"}, set(), {"aggregation_error"},
    ]  # fmt: skip
    for state in tmp_path.glob("checkpoints/round-*/state.json"):
        assert "method" not in read_json(state)["values"]
