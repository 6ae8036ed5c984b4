"""Degenerate outputs of a generator, against counts made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fedcustom
from fedcustom.data.build import build_data
from fedcustom.evaluation.degenerate import degenerate_shares, in_words, is_repetitive
from fedcustom.evaluation.metrics import text_metrics
from fedcustom.evaluation.settings import TEXT_METRICS
from fedcustom.federated.callbacks import Callback
from fedcustom.models import inference
from fedcustom.recipe.recipe import load_recipe

LOOP = "the vaults of the vaults of the vaults of the vaults"  # 9 3-grams, of which 3 are different


def test_loops() -> None:
    assert is_repetitive(LOOP)
    assert not is_repetitive("no no no no no no no")  # seven words
    assert is_repetitive("no no no no no no no no")
    # 8 3-grams: "a b c" comes once more, and so does "b c d"; the others are new.
    assert not is_repetitive("a b c d e a b c d f")
    # 6 3-grams: half of them stand earlier, which is not over half.
    assert not is_repetitive("a b c a b c a b")
    assert is_repetitive("a b c a b c a b c")  # 4 of 7
    assert not is_repetitive("")


def test_shares_of_degenerate_texts() -> None:
    texts = ["", " \n", LOOP, "a fine text", "another one"]
    references = [["a"], ["b"], ["c", "d"], ["e"], ["f"]]
    assert degenerate_shares(texts, references) == {"empty": 0.4, "repetitive": 0.2, "constant": 0.0}
    references[2] = ["c", LOOP]  # it was asked for
    assert degenerate_shares(texts, references)["repetitive"] == 0.0


def test_one_text_for_all() -> None:
    references = [["a", "b"], ["c"], ["d"], ["e"]]
    assert degenerate_shares(["x", "x", "x", "y"], references)["constant"] == 0.75
    assert degenerate_shares(["x", "x", "y", "y"], references)["constant"] == 0.0  # half is not over half
    assert degenerate_shares(["x", "x", "x", "y"], [["x"]] * 3 + [["y"]])["constant"] == 0.0
    assert degenerate_shares(["x"], [["y"]])["constant"] == 0.0  # one output is no pattern
    assert degenerate_shares(["", "", ""], references[:3]) == {
        "empty": 1.0,
        "repetitive": 0.0,
        "constant": 0.0,
    }


def test_what_is_warned_of() -> None:
    assert in_words({"empty": 0.0, "repetitive": 0.4, "constant": 0.75}) == (
        "degenerate test outputs: 40 % repeat themselves, 75 % are one and the same text"
    )
    assert in_words({"empty": 0.04, "repetitive": 0.0, "constant": 0.0}) is None
    assert in_words({}) is None


class Told(Callback):
    """Keeps what it is told in the end."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def on_note(self, text: str) -> None:
        self.said.append(text)

    def on_run_end(self, summary: Any) -> None:
        self.said.append("finished")


def test_a_run_says_so(generation: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The summary has the copies' scores and the shares; the warning comes last, and stays in the log."""
    monkeypatch.setattr(inference, "generate", lambda model, base, sources, settings: [LOOP] * len(sources))
    told = Told()
    run = fedcustom.run({**generation, "rounds": {"count": 1}}, out=tmp_path / "run", callbacks=[told])
    recipe = load_recipe(generation)
    test = build_data(recipe.data, recipe.clients, recipe.seed).test
    copies = text_metrics([e.text for e in test], [e.references for e in test])
    assert run.summary["copy"] == pytest.approx(copies)
    assert run.summary["copy"].keys() == {*TEXT_METRICS}
    assert run.summary["degenerate"] == {"empty": 0.0, "repetitive": 1.0, "constant": 1.0}
    warning = "degenerate test outputs: 100 % repeat themselves, 100 % are one and the same text"
    assert told.said[-2:] == ["finished", warning]
    assert (run.directory / "warnings.log").read_text().endswith(f" {warning}\n")


def test_a_classifier_has_neither(small: dict[str, Any], tmp_path: Path) -> None:
    run = fedcustom.run({**small, "rounds": {"count": 1}}, out=tmp_path / "run")
    summary = json.loads((run.directory / "summary.json").read_text())
    assert not {"copy", "degenerate"} & summary.keys()
