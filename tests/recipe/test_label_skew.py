"""``training.label_skew`` and ``training.fit_head`` against the finer settings that they stand for."""

from __future__ import annotations

from typing import Any

import pytest

from fedcustom.core.errors import RecipeError
from fedcustom.federated.resolve import resolved
from fedcustom.models.facts import ModelFacts
from fedcustom.recipe.defaults import complete
from fedcustom.recipe.recipe import load_recipe

LONG = {"clients.partition": "iid", "rounds.count": 20, "clients.count": 40, "rounds.clients_per_round": 10}

FINER: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"label_skew": "auto"}, {}),
    ({"label_skew": "none"}, {"logit_adjustment": 0.0, "fit_head_rounds": [1, -1]}),
    ({"label_skew": "none", "fit_head": False}, {"logit_adjustment": 0.0, "fit_head_rounds": []}),
    ({"label_skew": "adjust"}, {"logit_adjustment": 1.0, "fit_head_rounds": [1, -1]}),
    ({"label_skew": "adjust", "fit_head": False}, {"logit_adjustment": 1.0, "fit_head_rounds": []}),
    (
        {"label_skew": "adjust", "logit_adjustment": 0.5},
        {"logit_adjustment": 0.5, "fit_head_rounds": [1, -1]},
    ),
    ({"fit_head": False}, {"fit_head_rounds": [], "logit_adjustment": 0.0}),
    ({"fit_head": True}, {}),
    ({"fit_head": True, "logit_adjustment": 0.0}, {"logit_adjustment": 0.0, "fit_head_rounds": [1, -1]}),
]


@pytest.mark.parametrize(("coarse", "finer"), FINER, ids=lambda part: str(part))
def test_the_coarse_settings_are_the_finer_ones(
    small: dict[str, Any], coarse: dict[str, Any], finer: dict[str, Any]
) -> None:
    given = load_recipe(small, {**LONG, **{f"training.{key}": value for key, value in coarse.items()}})
    said = load_recipe(small, {**LONG, **{f"training.{key}": value for key, value in finer.items()}})
    found = resolved(given)
    assert found == resolved(said)
    assert found.training.label_skew is None
    assert found.training.fit_head is None
    assert resolved(found) == found


def test_balance_is_the_selection_of_cohorts(small: dict[str, Any]) -> None:
    by_selection = resolved(load_recipe(small, {**LONG, "rounds.selection": "balanced"}))
    assert resolved(load_recipe(small, {**LONG, "training.label_skew": "balance"})) == by_selection
    many = {**LONG, "clients.count": 1000, "training.label_skew": "balance"}
    assert resolved(load_recipe(small, many)).training.fit_head_clients is None  # all tell of their labels


def test_a_short_run_fits_a_head_that_is_asked_for(small: dict[str, Any]) -> None:
    assert resolved(load_recipe(small, {"rounds.count": 3})).training.fit_head_rounds == []
    asked = load_recipe(small, {"rounds.count": 3, "training.fit_head": True})
    assert resolved(asked).training.fit_head_rounds == [1, -1]
    assert resolved(asked).training.freeze_head_rounds == 3


def test_baselines_are_not_skewed(small: dict[str, Any]) -> None:
    for skew in ("adjust", "balance"):
        recipe = load_recipe(small, {**LONG, "training.label_skew": skew})
        central = resolved(recipe.for_method("prefix", "centralised"))
        assert central.training.logit_adjustment == 0.0
        assert central.rounds.selection is None
        assert central.training.fit_head_rounds == [1, -1]


CONTRADICTIONS = [
    ({"training.label_skew": "none", "training.logit_adjustment": 1.0}, "logit_adjustment = 1.0"),
    ({"training.label_skew": "adjust", "training.logit_adjustment": 0.0}, "logit_adjustment = 0.0"),
    ({"training.label_skew": "balance", "training.logit_adjustment": 1.0}, "logit_adjustment = 1.0"),
    ({"training.label_skew": "none", "rounds.selection": "balanced"}, "rounds.selection = 'balanced'"),
    ({"training.label_skew": "adjust", "rounds.selection": "balanced"}, "rounds.selection = 'balanced'"),
    ({"training.label_skew": "balance", "rounds.selection": "uniform"}, "rounds.selection = 'uniform'"),
    ({"training.label_skew": "balance", "training.fit_head": False}, "fit_head"),
    ({"training.fit_head": True, "training.fit_head_rounds": []}, r"fit_head_rounds = \[\]"),
    ({"training.fit_head": False, "training.fit_head_rounds": [1]}, r"fit_head_rounds = \[1\]"),
    ({"training.fit_head": True, "aggregation.rule": "multi_krum"}, "needs aggregation.rule = 'mean'"),
    ({"training.fit_head": True, "rounds.count": 2}, "must be 3 or more"),
    ({"training.label_skew": "none", "training.prior_count": 2.0}, "no effect without logit_adjustment"),
    ({"training.label_skew": "some"}, "'auto', 'none', 'adjust' or 'balance'"),
    ({"training.fit_head": "yes, please"}, "fit_head"),
]


@pytest.mark.parametrize(("overrides", "message"), CONTRADICTIONS, ids=lambda part: str(part))
def test_contradictions_are_refused(small: dict[str, Any], overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(small, {**LONG, **overrides})


@pytest.mark.parametrize("key", ["label_skew", "fit_head"])
def test_what_has_no_labels_has_no_label_skew(small: dict[str, Any], key: str) -> None:
    generation = {**small, "data": {"task": "generation", "train": "x.jsonl"}}
    with pytest.raises(RecipeError, match=f"training.{key} = .*needs labels"):
        load_recipe(generation, {f"training.{key}": {"label_skew": "adjust", "fit_head": True}[key]})


def test_defaults_are_filled_in_from_facts_alone(
    small: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No model is read, so a recipe whose model is not there is completed alike."""
    recipe = load_recipe(small, {**LONG, "model.base": "no/such-model"})
    found = complete(recipe, ModelFacts("encoder", linear_head=True, pooling="mean", normalize=True))
    assert (found.model.pooling, found.model.normalize) == ("mean", True)
    assert found.training.fit_head_rounds == [1, -1]
    large = complete(recipe, ModelFacts("large"))
    assert large.training.fit_head_rounds == []
    assert large.training.learning_rate == recipe.method.default_learning_rate("large")
    with pytest.raises(RecipeError, match="not known to end in one linear layer"):
        complete(load_recipe(recipe, {"training.fit_head": True}), ModelFacts("large"))
