"""Estimates of what a run needs, against runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fedcustom
from fedcustom.cli import estimate
from fedcustom.federated import resources
from fedcustom.federated.callbacks import Callback, Outline
from fedcustom.federated.resources import measure_resources
from fedcustom.federated.simulation import simulate
from fedcustom.methods import WeightTuning
from fedcustom.recipe.recipe import load_recipe, to_toml
from helpers.methods import SETTINGS, make


@pytest.mark.parametrize("name", ["full", "lora", "prefix memory", "prefix", "adapter"])
def test_figures_are_those_of_a_run(small: dict[str, Any], name: str, tmp_path: Path) -> None:
    technique = name.split()[0]
    small["method"] = {"name": technique, **SETTINGS[name]}
    found = measure_resources(load_recipe(small))
    summary = fedcustom.run(small, out=tmp_path / "run").summary
    assert (found.trained, found.head) == (summary["trainable_parameters"], summary["head_parameters"])
    sent = summary["bytes"]["down_total"] + summary["bytes"]["up_total"]
    assert found.outline.total is not None
    assert sent * 0.98 <= found.outline.total <= sent * 1.3  # an exchange that fits the head may end early
    alone = make(small["model"]["base"], technique, **SETTINGS[name]).base.model
    assert found.parameters == sum(p.numel() for p in alone.parameters())
    assert found.model_bytes == 4 * found.parameters
    assert found.client_bytes > 12 * (found.trained + found.head) + found.model_bytes
    assert found.round_seconds is not None
    assert found.run_seconds is not None
    assert found.run_seconds >= found.round_seconds > 0


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_rows_that_are_hidden_by_noise_for_few_steps(small: dict[str, Any], steps: int) -> None:
    """No more steps are measured than the noise is for."""
    small["training"] |= {"local_steps": steps}
    small["rounds"] = {"count": 1}
    small["privacy"] = {"unit": "example", "epsilon": 8.0, "delta": 1e-3}
    found = measure_resources(load_recipe(small))
    assert found.round_seconds is not None
    assert found.round_seconds > 0


def test_a_batch_needs_less_memory_with_checkpointing(
    small: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources.environment, "held_memory", lambda device: 0)
    whole = measure_resources(load_recipe(small, {"training.batch_size": 64}))
    less = measure_resources(
        load_recipe(small, {"training.batch_size": 64, "training.gradient_checkpointing": True})
    )
    held = [each.client_bytes - 12 * (each.trained + each.head) for each in (whole, less)]
    assert held[1] == pytest.approx(held[0] * (1 / 2 + 1 / 16), rel=0.05)  # two layers


def test_the_command_prints_lines_or_json(
    small: dict[str, Any], tmp_path: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(to_toml(load_recipe(small)))
    monkeypatch.setattr(resources.environment, "free_memory", lambda device: -(10**12))
    said = command("estimate", recipe, "--json", "--quiet")
    assert said.code == 0, said.error
    figures = json.loads(said.out)
    assert figures["outline"]["clients"] == 4
    assert figures["available_bytes"] < 0
    assert "a client needs about" in said.error
    figures["outline"] = Outline(**figures["outline"])
    found = resources.Resources(**figures)
    lines = dict(estimate.in_words(load_recipe(small), found))
    assert lines["trained"] == f"{figures['trained']:,} numbers and {figures['head']:,} of the head"
    assert lines["run"].startswith("4 clients with ")


def test_what_no_step_measures_is_named(small: dict[str, Any]) -> None:
    changes = {
        "training.learning_rate": "auto",
        "training.fit_head": True,
        "rounds.count": 3,
        "personalisation.finetune_epochs": 1,
    }
    plain = load_recipe(small, {"training.fit_head": False})
    found = measure_resources(plain)
    said = dict(estimate.in_words(plain, found))["time here"]
    assert said.endswith("by measured steps; evaluations come to that")
    said = dict(estimate.in_words(load_recipe(small, changes), found))["time here"]
    assert said.endswith(
        "; evaluations, the search of a learning rate, fits of the head and the clients' fine-tuning "
        "come to that"
    )


def test_methods_without_steps_are_refused(small: dict[str, Any], tmp_path: Path, command: Any) -> None:
    small["method"] = {"name": "prompt_engineering"}
    del small["training"]
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(to_toml(load_recipe(small)))
    said = command("estimate", recipe)
    assert said.code == 2
    assert "trains no tensors, so that there are no steps to measure" in said.error


@pytest.mark.parametrize("method", ["prefix", "full"])
def test_a_run_warns_before_its_first_round(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    small["method"] = {"name": method}
    plain = fedcustom.run(small, out=tmp_path / "plain")  # too small a model to look at
    monkeypatch.setattr(resources, "SMALL", 0)
    roomy = fedcustom.run(small, out=tmp_path / "roomy")
    monkeypatch.setattr(resources.environment, "free_memory", lambda device: -(10**12))
    tight = fedcustom.run(small, out=tmp_path / "tight")
    for run, warned in ((plain, False), (roomy, False), (tight, True)):
        log = run.directory / "warnings.log"
        assert ("GB of memory; this machine has" in (log.read_text() if log.exists() else "")) == warned
        assert run.summary["metrics"] == plain.summary["metrics"]


def test_no_more_rows_than_a_batch_are_tokenised_for_the_estimate(
    generation: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of preference pairs each row takes passes of the reference model."""
    monkeypatch.setattr(resources, "SMALL", 0)
    seen = list[int]()
    tokens = WeightTuning.tokens

    def counted(method: WeightTuning, examples: list[Any]) -> Any:
        seen.append(len(examples))
        return tokens(method, examples)

    monkeypatch.setattr(WeightTuning, "tokens", counted)
    recipe = load_recipe(generation, {"training.batch_size": 3})
    federation = simulate(recipe, tmp_path, tmp_path / "clients", Callback())
    seen.clear()
    assert resources.memory_warning(recipe, federation) is None
    assert seen == [3]
