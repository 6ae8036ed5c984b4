"""With ``model.dtype = "auto"`` a run's encoder and generator have one precision, wherever it is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fedcustom
from fedcustom import library
from fedcustom.methods.retrieval.generation import Generator
from helpers.precision import claim
from helpers.retrieval import rows

QUESTION = rows(1)[0]["question"]


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Another machine, on which a step in each precision takes so long; returns what is measured there."""

    def other(name: str, **seconds: float) -> list[tuple[int, int]]:
        monkeypatch.setenv("FEDCUSTOM_CACHE", str(tmp_path / name))
        return claim(monkeypatch, **seconds)

    return other


@pytest.fixture
def automatic(recipe: dict[str, Any], tiny: dict[str, str]) -> dict[str, Any]:
    recipe["model"]["dtype"] = "auto"
    recipe["method"] |= {"generator": tiny["llama"], "answer_tokens": 4}
    return recipe


def precisions(opened: library.Library) -> tuple[str, str]:
    generator = opened.method.generator
    assert isinstance(generator, Generator)
    return opened.method.base.precision, generator.base.precision


def test_a_runs_generator_has_the_runs_precision(
    automatic: dict[str, Any], tmp_path: Path, machines: Any
) -> None:
    """The encoder alone is measured, with the recipe's batch; nothing is where the run is opened."""
    measured = machines("one", float32=1.0, bfloat16=0.5)
    run = fedcustom.run(automatic, out=tmp_path / "run")
    assert len(measured) == 1
    assert json.loads((run.directory / "environment.json").read_text())["precision"] == "bfloat16"
    measured = machines("other", float32=0.5, bfloat16=1.0)
    opened = library.Library(run.directory)
    assert precisions(opened) == ("bfloat16", "bfloat16")
    assert opened.ask(QUESTION).passages
    assert not measured


def test_an_index_is_asked_in_the_precision_in_which_it_was_built(
    automatic: dict[str, Any], tmp_path: Path, machines: Any
) -> None:
    """Asked in another one, its documents would be those of another encoder; an update keeps it too."""
    machines("one", float32=1.0, bfloat16=0.5)
    library.index(automatic, tmp_path / "index")
    measured = machines("other", float32=0.5, bfloat16=1.0)
    opened = library.Library(tmp_path / "index")
    assert precisions(opened) == ("bfloat16", "bfloat16")
    assert len(opened.ask(QUESTION).passages) == len(library.ask(tmp_path / "index", QUESTION).passages) > 0
    library.index(automatic, tmp_path / "index")
    assert precisions(library.Library(tmp_path / "index")) == ("bfloat16", "bfloat16")
    assert not measured
    library.index(automatic, tmp_path / "new")
    assert precisions(library.Library(tmp_path / "new")) == ("float32", "float32")
    assert len(measured) == 1


def test_a_precision_that_the_recipe_names_is_not_chosen(automatic: dict[str, Any], tmp_path: Path) -> None:
    automatic["model"]["dtype"] = "float32"
    library.index(automatic, tmp_path / "index")
    assert precisions(library.Library(tmp_path / "index")) == ("float32", "float32")
