"""Paths: relative to the recipe that names them, and absolute in what a run remembers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import fedcustom
from fedcustom.core.errors import DataError, RecipeError
from fedcustom.experiment.settings import load_experiment
from fedcustom.recipe.recipe import load_recipe, recorded_recipe


@pytest.fixture
def project(small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``jobs/a.toml`` beside ``jobs/rows`` and ``models/bert``; the current folder is elsewhere."""
    shutil.copytree(small["data"]["source"], tmp_path / "jobs" / "rows")
    shutil.copytree(small["model"]["base"], tmp_path / "models" / "bert")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe = {**small, "model": {"base": "../models/bert"}, "data": {**small["data"], "source": "rows"}}
    recipe["compare"] = {"full": {"model": {"base": "../models/bert"}}}
    (tmp_path / "jobs" / "a.toml").write_text(tomli_w.dumps(recipe))
    return tmp_path


def test_a_run_of_relative_paths_is_opened_from_another_folder(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fedcustom.run("../jobs/a.toml", {"rounds.count": 1}, out="out")
    written = recorded_recipe(Path("out/recipe.toml"))
    assert written.model.base == str(project / "models" / "bert")
    assert written.data.source == str(project / "jobs" / "rows")
    assert written.compare["full"]["model"]["base"] == str(project / "models" / "bert")
    wanted = run.predict(["the cat"])
    monkeypatch.chdir(project)
    again = fedcustom.load("elsewhere/out")
    assert again.predict(["the cat"]) == wanted
    assert again.model() is not None
    assert fedcustom.run("jobs/a.toml", {"rounds.count": 1}, out="elsewhere/out").summary == run.summary


def test_a_dict_and_an_override_are_relative_to_the_current_folder(
    project: Path, small: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("../jobs/a.toml", ["data.source=../jobs/rows", 'model.base="../models/bert"'])
    assert recipe.data.source == str(project / "jobs" / "rows")
    assert recipe.model.base == str(project / "models" / "bert")
    given = {**small, "model": {"base": "../models/bert"}}
    assert load_recipe(given).model.base == "../models/bert"
    fedcustom.run(given, {"rounds.count": 1}, out="out")
    monkeypatch.chdir(project)
    assert fedcustom.load("elsewhere/out").recipe.model.base == str(project / "models" / "bert")


def test_a_model_that_has_gone_is_no_hub_id(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fedcustom.run("../jobs/a.toml", {"rounds.count": 1}, out="out")
    shutil.rmtree(project / "models")
    with pytest.raises(fedcustom.FedcustomError, match=r"no folder .*/models/bert"):
        fedcustom.load("out").predict(["the cat"])


def test_names_that_are_no_paths_stay(project: Path) -> None:
    for name in ("builtin:minilm", "bert-base-uncased", "org/model", "/abs/model"):
        (project / "b.toml").write_text(f'model.base = "{name}"\n')
        assert load_recipe(project / "b.toml").model.base == name
    for name, wanted in (("./x", "x"), ("a/b/c", "a/b/c"), ("x.csv", "x.csv"), ("..", "..")):
        (project / "b.toml").write_text(f'data.source = "{name}"\n')
        found = load_recipe(project / "b.toml").data.source
        assert found == str((project / wanted).resolve())
    (project / "b.toml").write_text('data.source = "~/x.csv"\n')
    assert load_recipe(project / "b.toml").data.source == str(Path.home() / "x.csv")


def test_a_path_from_the_current_folder_is_refused_with_the_right_one(project: Path) -> None:
    shutil.copytree(project / "jobs" / "rows", "rows2")
    (project / "jobs" / "b.toml").write_text('data.source = "rows2"\n')
    with pytest.raises(
        RecipeError, match=r"data.source = 'rows2': paths are relative .* is '../elsewhere/rows2'"
    ):
        load_recipe(project / "jobs" / "b.toml")
    (project / "jobs" / "b.toml").write_text('data.source = "../elsewhere/rows2"\n')
    assert load_recipe(project / "jobs" / "b.toml").data.source == str(project / "elsewhere" / "rows2")


def test_files_of_methods(project: Path) -> None:
    text = '[method]\nname = "prompt_engineering"\ninstructions_file = "prompts.txt"\n'
    (project / "jobs" / "b.toml").write_text(text)
    found: Any = load_recipe(project / "jobs" / "b.toml").method
    assert found.instructions_file == str(project / "jobs" / "prompts.txt")
    text = '[method]\nname = "distillation"\nclient_models = ["../models/bert", "org/x", "builtin:minilm"]\n'
    (project / "jobs" / "b.toml").write_text(f'{text}[public]\nsource = "rows"\n')
    found = load_recipe(project / "jobs" / "b.toml")
    assert found.method.client_models == [str(project / "models" / "bert"), "org/x", "builtin:minilm"]
    assert found.public.source == str(project / "jobs" / "rows")


def test_a_link_stays_a_link(project: Path) -> None:
    (project / "blob").write_text("text,label\na,b\n")
    (project / "jobs" / "c.csv").symlink_to(project / "blob")
    (project / "jobs" / "b.toml").write_text('data.source = "c.csv"\n')
    assert load_recipe(project / "jobs" / "b.toml").data.source == str(project / "jobs" / "c.csv")


def test_an_experiment_reads_its_recipe_from_the_current_folder(project: Path) -> None:
    (project / "jobs" / "e.toml").write_text('recipe = "a.toml"\n[axes.rounds.one]\nrounds.count = 1\n')
    _, base = load_experiment(Path("../jobs/e.toml"))
    assert base["data"]["source"] == "../jobs/rows"
    assert base["model"]["base"] == "../models/bert"


def test_a_missing_file_is_named(project: Path) -> None:
    (project / "jobs" / "b.toml").write_text('data.source = "nothing.csv"\nclients.partition = "iid"\n')
    with pytest.raises(DataError, match=r"jobs/nothing.csv: no such file or folder"):
        fedcustom.run(project / "jobs" / "b.toml", out="out")
