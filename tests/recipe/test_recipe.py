"""Recipes: what is refused, and how it is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from fedcustom.core.errors import RecipeError
from fedcustom.experiment.grid import digest
from fedcustom.federated.resolve import resolved
from fedcustom.methods import registry
from fedcustom.methods.full.settings import FullSettings
from fedcustom.methods.lora.settings import LoraSettings
from fedcustom.methods.settings import TuningSettings
from fedcustom.models.configuration import read_facts
from fedcustom.models.settings import ModelSettings
from fedcustom.models.size_class import ModelKind, kind_of, rough_parameters
from fedcustom.recipe.help import settings_help
from fedcustom.recipe.recipe import Recipe, load_recipe, to_toml


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trainin": {}}, r"trainin: unknown setting; allowed: .*did you mean 'training'"),
        (
            {"training": {"learning_rat": 0.1}},
            r"training.learning_rat: unknown setting.*did you mean 'learning_rate'",
        ),
        ({"training": {"alpha": 0.1}}, r"training.alpha: unknown setting.*did you mean '\w+.alpha'"),
        (
            {"method": {"name": "prefx"}},
            r"method.name = 'prefx': unknown method; allowed: .*did you mean 'prefix'",
        ),
        ({"method": {"length": 4}}, r"method.name = None: unknown method; allowed"),
        (
            {"method": {"name": "prefix", "lenght": 4}},
            r"method.lenght: unknown setting.*did you mean 'length'",
        ),
        (
            {"method": {"name": "prefix", "length": 0}},
            r"method.length = 0: must be greater than or equal to 1",
        ),
        ({"training": {"batch_size": "big"}}, r"training.batch_size = 'big': must be a valid integer"),
        ({"training": {"batch_size": 2.5}}, r"training.batch_size = 2.5: must be a valid integer"),
        ({"training": {"learning_rate": float("nan")}}, r"training.learning_rate = nan"),
        (
            {"clients": {"partition": "dirichlett"}},
            r"clients.partition = 'dirichlett': must be .*mean 'dirichlet'",
        ),
        (
            {"clients": {"development_fraction": 0.6, "test_fraction": 0.4}},
            r"clients: .*leave nothing to train on",
        ),
        (
            {"clients": {"partition": "iid", "count": 4}, "rounds": {"clients_per_round": 5}},
            r"rounds.clients_per_round = 5: there are 4 clients",
        ),
        (
            {"rounds": {"clients_per_round": 2, "min_clients": 3}},
            r"rounds.min_clients = 3: 2 clients take part",
        ),
        (
            {"evaluation": {"metric": "bleu"}},
            r"evaluation.metric = 'bleu': allowed for classification: accuracy",
        ),
        (
            {"training": {"warmup_rounds": 20}},
            r"training.warmup_rounds = 20: must be below rounds.count = 20",
        ),
        (
            {"training": {"local_epochs": 0.5, "local_steps": 3}},
            r"training: local_epochs = 0.5: has no effect while local_steps = 3",
        ),
        ({"compare": {"lra": {}}}, r"compare.lra: unknown method.*did you mean 'lora'"),
        ({"seed": -1}, r"seed = -1: must be greater than or equal to 0"),
    ],
)
def test_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "allowed"),
    [
        (
            {"training": {"learning_rate": "fast"}},
            "training.learning_rate = 'fast': must be a valid number or 'auto'",
        ),
        (
            {"privacy": {"unit": "client", "epsilon": 1.0, "delta": 1e-5, "clip": "all"}},
            "privacy.clip = 'all': must be a valid number or 'unit' or 'adaptive'",
        ),
    ],
)  # fmt: skip
def test_a_number_or_a_word_is_one_problem(values: dict[str, Any], allowed: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(values)
    assert str(caught.value).endswith(allowed)


def test_several_problems_are_counted() -> None:
    with pytest.raises(RecipeError, match=r"\(and 1 more\)"):
        load_recipe({"seed": -1, "training": {"batch_size": 0}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed = ", "not TOML"),
        (b"seed = 1\nseed = 2\n", "not TOML"),
        (b"\xff\xfe", "not a text in UTF-8"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(tmp_path)


def test_overrides_read_values_as_toml() -> None:
    recipe = load_recipe(
        {},
        ["training.learning_rate=1e-3", "rounds.count = 7", "model.base=my/model", 'data.text="{a} {b}"',
         "training.dropout=true"],
    )  # fmt: skip
    assert recipe.training.learning_rate == 1e-3
    assert recipe.rounds.count == 7
    assert recipe.model.base == "my/model"
    assert recipe.data.text == "{a} {b}"
    assert recipe.training.dropout is True
    assert load_recipe({}, {"rounds.count": 9}).rounds.count == 9


def test_another_methods_name_clears_the_old_ones_settings() -> None:
    recipe = load_recipe({"method": {"name": "prefix", "length": 8}}, ["method.name=lora"])
    assert recipe.method.model_dump() == registry.settings_of("lora")().model_dump()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rounds.count", "write key=value"),
        ("=3", "write key=value"),
        ("rounds.cont=3", r"rounds.cont: unknown setting.*did you mean 'count'"),
        ("rounds.count=many", r"rounds.count = 'many': must be a valid integer"),
    ],
)
def test_overrides_that_are_refused(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe({}, [override])


def test_a_complete_recipe_is_the_same_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(
        {
            "method": {"name": "lora", "rank": 4},
            "seed": 3,
            "compare": {"prefix": {"training": {"batch_size": 4}}},
        }
    )
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(resolved(recipe)))
    again = load_recipe(path)
    assert again == resolved(recipe)
    assert again.training.learning_rate == LoraSettings.rates.encoder


@pytest.mark.parametrize(
    ("base", "kind"),
    [
        ("builtin:minilm", "encoder"),
        ("builtin:lm", "decoder"),
        ("builtin:lm-small", "decoder"),
        ("no/such-model", "large"),
    ],
)
def test_the_default_learning_rate_is_of_the_kind_of_model(base: str, kind: ModelKind) -> None:
    assert read_facts(ModelSettings(base=base)).kind == kind
    task = "generation" if "lm" in base.removeprefix("builtin:minilm") else "classification"
    recipe = load_recipe({"model": {"base": base}, "data": {"task": task}})
    for name, registered in registry.methods().items():
        if name == "probe" or not issubclass(registered.settings, TuningSettings):
            continue
        rates = registered.settings.rates
        assert resolved(recipe.for_method(name)).training.learning_rate == rates.of(kind)
        assert rates.large <= rates.decoder


@pytest.mark.parametrize(
    ("configuration", "millions", "kind"),
    [
        (transformers.BertConfig(), 110, "large"),
        (transformers.DistilBertConfig(), 66, "large"),
        (transformers.GPT2Config(), 124, "large"),
        (transformers.T5Config(), 60, "large"),  # t5-small
        (
            transformers.BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536),
            22.7,
            "encoder",
        ),
        (
            transformers.BertConfig(hidden_size=128, num_hidden_layers=2, intermediate_size=512),
            4.4,
            "encoder",
        ),
        (transformers.LlamaConfig(vocab_size=8000, hidden_size=256, num_hidden_layers=6), 38, "decoder"),
        (transformers.PretrainedConfig(), None, "large"),
    ],
)
def test_about_how_large_a_model_is(configuration: Any, millions: float | None, kind: str) -> None:
    """As its publishers say."""
    found = rough_parameters(configuration)
    assert (found is None) == (millions is None)
    if found is not None and millions is not None:
        assert found / 1e6 == pytest.approx(millions, rel=0.15)
    assert kind_of(configuration) == kind


def test_comparison_settings_apply_to_their_method() -> None:
    recipe = load_recipe(
        {
            "method": {"name": "prefix", "length": 8},
            "training": {"learning_rate": 0.5, "batch_size": 4},
            "compare": {"lora": {"method": {"rank": 2}, "training": {"learning_rate": 0.25}}},
        }
    )
    lora, prefix, full = (resolved(recipe.for_method(name)) for name in ("lora", "prefix", "full"))
    assert (lora.method.rank, lora.training.learning_rate, lora.training.batch_size) == (2, 0.25, 4)  # type: ignore[union-attr]
    assert (prefix.method.length, prefix.training.learning_rate) == (8, 0.5)  # type: ignore[union-attr]
    assert full.training.learning_rate == FullSettings.rates.encoder
    with pytest.raises(RecipeError, match="did you mean 'lora'"):
        recipe.for_method("loar")


def test_every_setting_has_help_and_a_default() -> None:
    lines = list(settings_help(Recipe))
    keys = [key for key, *_ in lines]
    for section, field in Recipe.model_fields.items():
        assert any(key == section or key.startswith((f"[{section}]", f"{section}.")) for key in keys), section
        assert field.description
    for key, kind, default, text in lines:
        assert text, key
        if not key.startswith("["):
            assert kind, key
            assert default, key


def test_whole_epochs_are_the_same_recipe_however_they_are_written() -> None:
    one, point, part = (load_recipe({"training": {"local_epochs": n}}) for n in (1, 1.0, 0.25))
    assert repr(one.training.local_epochs) == repr(point.training.local_epochs) == "1"
    assert digest(one) == digest(point) == digest(load_recipe({})) != digest(part)


@pytest.mark.parametrize("base", ["builtin:minilm", "builtin:lm"])
def test_a_network_in_front_of_a_soft_prompt_has_a_lower_rate(base: str) -> None:
    """At the rate of vectors its first change is hundreds of times the state: the norm gate refuses it."""
    task = "generation" if base == "builtin:lm" else "classification"
    recipe = load_recipe({"model": {"base": base}, "data": {"task": task}})
    rates = {}
    for encoder in ("none", "mlp", "lstm"):
        given = {"name": "soft_prompt", "encoder": encoder}
        rates[encoder] = resolved(load_recipe(recipe, {"method": given})).training.learning_rate
    assert rates["mlp"] == rates["lstm"] < rates["none"]


def test_a_setting_is_taken_back_by_unset(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        '[data]\nlimit = 10\n[training]\nlearning_rate = 0.5\n[method]\nname = "lora"\nrank = 3\n'
    )
    recipe = load_recipe(path, ["data.limit=unset", "method.rank = unset", "rounds.count=unset"])
    default = load_recipe({"method": {"name": "lora"}})
    assert recipe.data.limit is None
    assert recipe.method == default.method
    assert recipe.training.learning_rate == 0.5
    assert load_recipe(path, ['data.label="unset"']).data.label == "unset"  # quoted, it is a text
    with pytest.raises(RecipeError, match=r"method.name = None"):
        load_recipe(path, ["method.name=unset"])
    for key, said in (
        ("training.learning_rat", r"training.learning_rat: unknown .* did you mean 'learning_rate'"),
        ("method.rnk", r"rnk: unknown setting"),
        ("data.limit.rows", r"data.limit = \{\}"),
    ):
        with pytest.raises(RecipeError, match=said):
            load_recipe(path, [f"{key}=unset"])
