"""Recipes with privacy: the defaults that go with it, and refusals that name their key."""

from __future__ import annotations

from typing import Any

import pytest

from fedcustom.core.errors import RecipeError
from fedcustom.data.settings import ClientSettings
from fedcustom.evaluation.settings import EvaluationSettings
from fedcustom.models.facts import ModelFacts
from fedcustom.privacy.settings import PrivacySettings
from fedcustom.recipe.defaults import complete
from fedcustom.recipe.help import settings_help
from fedcustom.recipe.recipe import Recipe, load_recipe, parse_recipe, to_toml
from fedcustom.recipe.sections import RoundSettings
from fedcustom.training.settings import TrainingSettings

PRIVATE: dict[str, Any] = {
    "clients": {"partition": "iid", "count": 100},
    "rounds": {"count": 10, "clients_per_round": 20},
    "privacy": {"unit": "client", "epsilon": 8.0, "delta": 1e-4},
}


def recipe(**sections: Any) -> Recipe:
    values = dict(PRIVATE)
    for section, content in sections.items():
        old = values.get(section, {})
        values[section] = {**old, **content} if isinstance(content, dict) else content
    return load_recipe(values)


def test_recipes_without_it_have_no_such_section() -> None:
    assert load_recipe({}).privacy is None
    assert "privacy" not in to_toml(load_recipe({}))
    assert load_recipe({}).training.optimizer == "adamw"
    assert load_recipe({"privacy": {}}).client_privacy is None


def test_defaults_that_go_with_hidden_clients() -> None:
    found = recipe()
    assert found.training.optimizer == "sgd"
    assert found.training.fit_head_rounds == []
    assert found.training.fit_head_steps == 0
    assert found.aggregation.weighting == "uniform"
    assert (found.evaluation.select, found.evaluation.calibrate) == ("last", False)
    assert recipe(training={"optimizer": "adamw"}).training.optimizer == "adamw"
    assert recipe(training={"fit_head_rounds": [1]}).training.fit_head_rounds == [1]
    own = recipe(data={"development": "dev"}).evaluation
    assert (own.select, own.calibrate) == ("best", True)


def test_a_recipe_stays_the_same_when_it_is_written_and_read() -> None:
    found = recipe(privacy={"clip": 0.5, "clip_head": "unit"})
    import tomllib

    assert parse_recipe(tomllib.loads(to_toml(found)), "again") == found
    assert load_recipe(found, ["privacy.epsilon=2.0"]).privacy == found.privacy.model_copy(  # type: ignore[union-attr]
        update={"epsilon": 2.0}
    )
    assert load_recipe(found, ["privacy=unset"]).privacy is None


def test_baselines_have_none() -> None:
    assert recipe().for_method("lora", "centralised").privacy is None
    assert recipe().for_method("lora").privacy == recipe().privacy


def test_its_settings_are_listed() -> None:
    keys = [key for key, *_ in settings_help(Recipe)]
    assert {"[privacy]", "privacy.unit", "privacy.epsilon", "privacy.clip"} <= set(keys)


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"privacy": {"noise": "sum"}}, "privacy.noise"),
        ({"secure_sum": {"on": True}}, "secure_sum.on"),
        ({"privacy": {"noise": "client"}, "secure_sum": {"on": True}}, "secure_sum.on"),
        ({"privacy": {"noise": "client"}, "training": {"fit_head_rounds": [1]}}, "training.fit_head_rounds"),
        ({"privacy": {"accept_noise": True}}, "accept_noise"),
        ({"privacy": {"head_share": 0.3}}, "privacy.head_share"),
        ({"privacy": {"head_clip": 2.0}}, "privacy.head_clip"),
        *[
            ({"privacy": {"noise": noise, **more}, "secure_sum": {"on": noise == "sum"}}, f"privacy.{key}")
            for noise in ("sum", "client")
            for key, more in (
                ("participation", {"participation": "poisson"}),
                ("bands", {"bands": 2}),
                ("clip", {"clip": "adaptive"}),
                ("clip_head", {"clip_head": "adaptive"}),
            )
        ],
        ({"privacy": {"noise": "sum"}, "secure_sum": {"on": True, "bound": 3.0}}, "secure_sum.bound"),
        (
            {"privacy": {"noise": "sum"}, "secure_sum": {"on": True}, "compression": {"kind": "int8"}},
            "compression.kind",
        ),
        (
            {
                "privacy": {"noise": "sum"},
                "secure_sum": {"on": True},
                "training": {"fit_head_rounds": [1]},
            },
            "training.fit_head_rounds",
        ),
        ({"privacy": {"epsilom": 1.0}}, "privacy.epsilom"),
        ({"privacy": {"noise_multiplier": 1.0}}, "epsilon"),
        ({"baseline": "centralised"}, "privacy"),
        ({"aggregation": {"weighting": "examples"}}, "aggregation.weighting"),
        *[
            ({"aggregation": {"rule": rule}}, "aggregation.rule")
            for rule in ("fednova", "median", "trimmed_mean", "krum", "multi_krum", "geometric_median")
        ],
        *[
            ({"aggregation": {"rule": rule}}, "aggregation.rule")
            for rule in ("norm_bounding", "centred_clipping", "fltrust")
        ],
        (
            {"aggregation": {"correction": "scaffold"}, "training": {"clip_norm": 0.0}},
            "aggregation.correction",
        ),
        ({"aggregation": {"correction": "feddyn"}}, "aggregation.correction"),
        ({"aggregation": {"max_norm_ratio": 5.0}}, "aggregation.max_norm_ratio"),
        ({"participation": {"buffer": 5}}, "participation.buffer"),
        *[
            ({"method": {"name": "lora", "variant": variant}}, "method.variant")
            for variant in ("flora", "fedex", "flexlora", "hetlora")
        ],
        *[
            ({"method": {"name": "prefix", "kind": "kv", "merging": merging}}, "method.merging")
            for merging in ("matched", "stacked")
        ],
        ({"method": {"name": "prefix", "kind": "memory", "merging": "alternate"}}, "method.merging"),
        ({"method": {"name": "prefix", "kind": "kv", "layers_sent": 2}}, "method.layers_sent"),
        ({"training": {"learning_rate": "auto"}}, "training.learning_rate"),
        ({"training": {"search_rates": [0.1, 0.2]}}, "training.search_rates"),
        ({"training": {"label_skew": "balance"}}, "training.label_skew"),
        ({"training": {"fit_head_rounds": [1], "fit_head_steps": 3}}, "training.fit_head_steps"),
        ({"rounds": {"selection": "balanced"}, "training": {"fit_head_rounds": [1]}}, "rounds.selection"),
        ({"rounds": {"checkpoint_every": 2}}, "rounds.checkpoint_every"),
        ({"privacy": {"participation": "poisson"}}, "rounds.clients_per_round"),
        ({"evaluation": {"select": "best"}}, "evaluation.select"),
        ({"evaluation": {"calibrate": True}}, "evaluation.calibrate"),
        ({"method": {"name": "prompt_engineering"}}, "method.name"),
        ({"method": {"name": "distillation"}, "public": {"fraction": 0.1}}, "method.name"),
        ({"method": {"name": "probe"}}, "method.name"),
    ],
)
def test_what_has_no_guarantee_is_refused_by_its_key(sections: dict[str, Any], key: str) -> None:
    with pytest.raises(RecipeError, match=key.replace(".", r"\.")) as caught:
        recipe(**sections)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("variant", ["fedit", "ffa", "fedsa", "rolora", "fedsb", "fedsvd"])
def test_variants_whose_factors_are_averaged_are_allowed(variant: str) -> None:
    assert recipe(method={"name": "lora", "variant": variant}).client_privacy is not None


def test_clients_that_noise_what_is_summed() -> None:
    found = recipe(privacy={"noise": "sum"}, secure_sum={"on": True})
    assert found.privacy is not None
    assert (found.privacy.place, found.aggregation.weighting) == ("sum", "uniform")
    assert found.evaluation.select == "last"
    assert recipe(privacy={"noise": "sum", "clip": 0.5, "bands": 1}, secure_sum={"on": True, "colluding": 3})
    assert recipe(privacy={"noise": "client", "accept_noise": False}).privacy is not None


def test_a_completed_recipe_keeps_what_is_promised() -> None:
    """What is filled in for a fitted head is nothing that a guarantee does not go with, and is read again."""
    import tomllib

    facts = ModelFacts("encoder", linear_head=True, pooling="mean", normalize=True)
    found = complete(recipe(training={"fit_head": True}), facts)
    assert found.training.fit_head_rounds == [1, -1]
    assert found.rounds.selection != "balanced"
    assert parse_recipe(tomllib.loads(to_toml(found)), "again") == found


def test_a_recipe_of_parts_is_checked_when_it_is_complete() -> None:
    """Its sections are settings, not mappings, in which no default of privacy was filled."""
    facts = ModelFacts("encoder", linear_head=True, pooling="mean", normalize=True)
    example = {"unit": "example", "epsilon": 8.0, "delta": 1e-5}
    made = Recipe(
        clients=ClientSettings(partition="iid", count=100),
        rounds=RoundSettings(count=10, clients_per_round=20),
        training=TrainingSettings(batch_size=8),
        evaluation=EvaluationSettings(select="last", calibrate=False),
        privacy=PrivacySettings(**example),
    )
    with pytest.raises(RecipeError, match=r"rounds.selection|training.fit_head_rounds|logit_adjustment"):
        complete(made, facts)
