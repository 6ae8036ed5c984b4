"""``recipe``: what it refuses before anything loads, and its help by section; ``--version``, completion."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fedcustom.core.errors import RecipeError
from fedcustom.recipe.help import section_help, settings_help
from fedcustom.recipe.recipe import Recipe, load_recipe
from helpers.rows import write_jsonl

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "json"])
@pytest.mark.parametrize(
    ("values", "prompt", "message"),
    [
        (
            CHAT,
            "{messages}",
            "holds a list of messages: set data.task = 'chat', or write the prompt and the answer to",
        ),
        (["a"], "{messages}", "holds a list: write what is wanted of it"),
        ({"a": "b"}, "Say {messages}", "holds an object"),
        (CHAT, "{messages[0][content]}", "picks from the list or object in 'messages'"),
        (CHAT, "{messages.0.content}", "no column 'messages.0.content'"),
    ],
)
def test_templates_of_containers_are_refused_before_anything_loads(
    command: Any, tmp_path: Path, kind: str, values: Any, prompt: str, message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    rows = [{"messages": values, "target": "x"}] * 8
    if kind == "parquet":
        pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    elif kind == "json":
        (tmp_path / "a.json").write_text(json.dumps(rows))
    else:
        write_jsonl(tmp_path / "a.jsonl", rows)
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f'data.source = "a.{kind}"\ndata.task = "generation"\ndata.prompt = "{prompt}"\n'
        'clients.partition = "iid"\nclients.count = 2\nmodel.base = "builtin:lm-small"\n'
    )
    loaded = list[str]()
    monkeypatch.setattr("fedcustom.federated.simulation.load_for", lambda *a, **k: loaded.append("base"))
    for arguments in (("recipe", recipe), ("run", recipe, "--out", tmp_path / "out")):
        said = command(*arguments)
        assert (said.code, said.out) == (2, ""), said.error
        assert message in " ".join(said.error.split())
    assert not loaded
    assert not (tmp_path / "out").exists()


def test_a_column_that_is_missing_or_empty_later(command: Any, tmp_path: Path) -> None:
    """Objects may lack a column in the first rows; a recipe can be checked where its data are not."""
    rows = [{"text": "a", "label": "x"}] * 120 + [{"text": "b", "label": "y", "more": [1]}] * 3
    write_jsonl(tmp_path / "a.jsonl", rows)
    recipe = tmp_path / "r.toml"
    recipe.write_text('data.source = "a.jsonl"\ndata.text = "{text}"\nclients.partition = "iid"\n')
    assert command("recipe", recipe).code == 0
    recipe.write_text('data.source = "gone.jsonl"\nclients.partition = "iid"\n')
    assert command("recipe", recipe).code == 0


@pytest.mark.parametrize("text", ["", "\n# nothing\n", "[data]\n", "[data]\n[model]\n[compare.full.data]\n"])
def test_an_empty_recipe_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(RecipeError, match="is empty; a recipe to start from is written by"):
        load_recipe(tmp_path / "r.toml", {"seed": 1})


def test_help_of_one_section(command: Any) -> None:
    everything = list(settings_help(Recipe))
    keys = [entry[0] for entry in everything]
    training = [key for key in keys if key.startswith("training.")]
    assert [entry[0] for entry in section_help(Recipe, "training")] == ["[training]", *training]
    lora = [entry[0] for entry in section_help(Recipe, "lora")]
    assert lora[0] == "[method] name = 'lora'"
    assert "method.rank" in lora
    assert not any("prefix" in key for key in lora)
    assert [entry[0] for entry in section_help(Recipe, "method.lora")] == lora
    one = [entry[0] for entry in section_help(Recipe, "batch_size")]
    assert one == ["[training]", "training.batch_size", "[evaluation]", "evaluation.batch_size"]
    assert [entry[0] for entry in section_help(Recipe, "seed")] == ["seed"]
    assert len([key for key in (e[0] for e in section_help(Recipe, "method")) if key[0] == "["]) == len(
        [key for key in keys if key.startswith("[method]")]
    )
    said = command("recipe", "--help-all", "clients")
    assert "clients.alpha" in said.out
    assert "training." not in said.out
    wrong = command("recipe", "--help-all", "trainin")
    assert wrong.code == 2
    assert "no section, method or setting 'trainin'; sections:" in " ".join(wrong.error.split())
    assert "did you mean 'training'?" in " ".join(wrong.error.split())


def test_the_version(command: Any) -> None:
    said = command("--version")
    assert (said.code, said.out) == (0, f"fedcustom {importlib.metadata.version('fedcustom')}\n")


def test_completion_by_the_shell() -> None:
    code = "import sys; sys.argv = ['fedcustom']; from fedcustom.cli.app import main; main()"
    asked = {"_FEDCUSTOM_COMPLETE": "complete_bash", "COMP_WORDS": "fedcustom re", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **asked, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(done.stdout.split()) == {"report", "recipe"}
    shown = subprocess.run(
        [sys.executable, "-c", code.replace("['fedcustom']", "['fedcustom', '--help']")],
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--install-completion" in shown.stdout
    assert "--version" in shown.stdout
