"""What a recipe that hides rows fills in and refuses, each refusal by the name of its key."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fedcustom.core.errors import RecipeError
from fedcustom.recipe.recipe import load_recipe

BASE: dict[str, Any] = {
    "data": {"source": "rows.csv", "text": "{text}", "label": "label"},
    "clients": {"partition": "iid", "count": 10},
    "method": {"name": "lora"},
    "privacy": {"unit": "example", "epsilon": 8, "delta": 1e-5},
}


def test_defaults() -> None:
    recipe = load_recipe(BASE)
    assert recipe.training.clip_norm == 0
    assert recipe.training.fit_head_rounds == []
    assert recipe.evaluation.select == "last"
    assert recipe.evaluation.calibrate is False
    assert recipe.example_privacy is recipe.privacy
    assert recipe.client_privacy is None
    assert load_recipe(BASE, {"training.clip_norm": 2.0}).training.clip_norm == 2.0
    own = load_recipe(BASE, {"data.development": "dev"})
    assert own.evaluation.select == type(own.evaluation)().select


def test_a_noised_fit_of_the_head_is_one_exchange() -> None:
    recipe = load_recipe(BASE, {"training.fit_head_rounds": [1], "privacy.head_share": 0.5})
    assert recipe.training.fit_head_steps == 0
    assert load_recipe(BASE).training.fit_head_steps == type(recipe.training)().fit_head_steps
    for key, value in (("fit_head_steps", 3), ("fit_head_least_texts", 2)):
        with pytest.raises(RecipeError, match=key):
            load_recipe(BASE, {"training.fit_head_rounds": [1], f"training.{key}": value})
    summed = {"training.fit_head_rounds": [1], "secure_sum.on": True, "secure_sum.most_examples": 100}
    assert load_recipe(BASE, summed).training.fit_head_rounds == [1]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("method.name", "full"),
        ("method.name", "probe"),
        ("method.name", "retrieval"),
        ("method.name", "distillation"),
        ("method.name", "prompt_engineering"),
        ("method.dora", True),
        ("method.dropout", 0.1),
        ("aggregation.correction", "feddyn"),
        ("aggregation.rule", "fltrust"),
        ("participation.buffer", 2),
        ("personalisation.finetune_epochs", 2),
        ("rounds.selection", "balanced"),
        ("rounds.checkpoint_every", 2),
        ("training.learning_rate", "auto"),
        ("training.search_rates", [0.1, 0.2]),
        ("training.label_skew", "adjust"),
        ("training.label_skew", "balance"),
        ("training.logit_adjustment", 1.0),
        ("training.fit_head", True),
        ("training.fit_head_rounds", [2]),
        ("training.fit_head_rounds", [1, -1]),
        ("training.dropout", True),
        ("model.compile", True),
        ("evaluation.select", "best"),
        ("evaluation.calibrate", True),
        ("privacy.clip", "adaptive"),
        ("privacy.clip_head", "adaptive"),
        ("privacy.participation", "poisson"),
        ("privacy.bands", 2),
        ("privacy.head_share", 0.5),
        ("privacy.head_clip", 1.0),
        ("privacy.noise", "server"),
    ],
)
def test_refusals_name_their_key(key: str, value: Any) -> None:
    with pytest.raises(RecipeError) as refused:
        load_recipe(BASE, {key: value, **({"rounds.count": 10} if key.startswith("rounds") else {})})
    assert re.search(rf"\b{re.escape(key.partition('.')[2])}\b", str(refused.value)), str(refused.value)
    assert "example" in str(refused.value)


@pytest.mark.parametrize(
    ("method", "key"),
    [
        ({"name": "prefix", "reparametrise": True}, "method.reparametrise = true"),
        ({"name": "soft_prompt", "encoder": "mlp"}, "method.encoder = 'mlp'"),
    ],
)
def test_networks_are_refused(method: dict[str, Any], key: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(key)):
        load_recipe({**BASE, "method": method})


@pytest.mark.parametrize(
    "overrides",
    [
        {"aggregation.rule": "median"},
        {"aggregation.weighting": "examples"},
        {"aggregation.server_optimizer": "fedadam"},
        {"training.proximal": 0.1},
        {"training.optimizer": "sgd", "training.momentum": 0.9},
        {"compression.kind": "int8"},
        {"personalisation.keep": ["head"]},
        {"method.variant": "flora"},
        {"method.variant": "fedsa"},
        {"method.name": "prefix", "method.merging": "stacked"},
        {"privacy.clip": 0.5, "privacy.clip_head": 2.0},
    ],
)
def test_post_processing_is_allowed(overrides: dict[str, Any]) -> None:
    assert load_recipe(BASE, overrides).example_privacy is not None
