"""Which texts an evaluation writes: all, those of some test inputs, or none."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import sacrebleu

import fedcustom
import fedcustom.models.inference as inference
from fedcustom.core.errors import ModelError, RecipeError
from fedcustom.evaluation.settings import TEXT_METRICS
from fedcustom.recipe.recipe import load_recipe
from fedcustom.report.read import read_runs
from fedcustom.report.tables import comparison

ROWS = 40
"""Test rows of the tiny data."""


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For how many prompts texts are written, call by call; those of trial passes are left out."""
    counts: list[int] = []
    generate = inference.generate

    def counted(model: Any, base: Any, sources: Any, settings: Any) -> list[str]:
        if settings.max_new_tokens > 2:
            counts.append(len(sources))
        return generate(model, base, sources, settings)

    monkeypatch.setattr(inference, "generate", counted)
    return counts


def lines(run: fedcustom.Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.directory / "predictions.jsonl").read_text().splitlines()]


def test_a_part_of_the_texts_is_that_part_of_all(
    generation: dict[str, Any], tmp_path: Path, written: list[int]
) -> None:
    whole = fedcustom.run(generation, out=tmp_path / "whole")
    assert written == [ROWS, ROWS]  # of the untuned model and after the last round
    written.clear()
    part = fedcustom.run(generation, {"evaluation.generate_limit": 16}, out=tmp_path / "part")
    assert written == [16]

    chosen = [lines(whole)[number * ROWS // 16] for number in range(16)]
    assert lines(part) == chosen
    assert part.summary["generated"] == {"texts": 16, "of": ROWS}
    assert "generated" not in whole.summary
    assert part.summary["metrics"]["loss"] == whole.summary["metrics"]["loss"]
    width = max(len(row["references"]) for row in chosen)
    streams: Any = [
        [row["references"][i] if i < len(row["references"]) else None for row in chosen] for i in range(width)
    ]
    for name, prediction in (("metrics", "prediction"), ("copy", "source")):
        score = sacrebleu.corpus_chrf([row[prediction].strip() for row in chosen], streams).score
        assert part.summary[name]["chrf"] == pytest.approx(score)
    assert set(part.summary["untuned"]) == {"loss"}
    assert part.summary["untuned"]["loss"] == whole.summary["untuned"]["loss"]
    assert all(
        set(scores) <= {"examples", "test_examples", "loss"} for scores in part.summary["clients"].values()
    )
    assert part.history["development.loss"].tolist() == whole.history["development.loss"].tolist()


def test_a_limit_beyond_the_test_rows_writes_all(
    generation: dict[str, Any], tmp_path: Path, written: list[int]
) -> None:
    run = fedcustom.run(generation, {"evaluation.generate_limit": ROWS + 1}, out=tmp_path / "run")
    assert written == [ROWS]
    assert len(lines(run)) == ROWS
    assert "generated" not in run.summary


@pytest.mark.parametrize("baseline", ["federated", "local"])
def test_without_texts_the_loss_is_all(
    generation: dict[str, Any], tmp_path: Path, written: list[int], baseline: str
) -> None:
    recipe = {**generation, "baseline": baseline}
    run = fedcustom.run(recipe, {"evaluation.generate": False}, out=tmp_path / "run")
    assert written == []
    assert set(run.summary["metrics"]) == set(run.summary["untuned"]) == {"loss"}
    assert not run.summary.keys() & {"copy", "degenerate", "generated"}
    if baseline == "federated":
        assert lines(run) == []
        assert run.predict(["a b :"])[0].keys() == {"text"}  # asked for, it writes
        assert (run.export(tmp_path / "exported", check=False) / "README.md").exists()


def test_reports_show_the_perplexity_and_how_many_texts_were_written(
    generation: dict[str, Any], tmp_path: Path, command: Any
) -> None:
    cheap = {"rounds.count": 1, "evaluation.untuned": False}
    fedcustom.run(generation, {**cheap, "evaluation.generate_limit": 16}, out=tmp_path / "a")
    run = fedcustom.run(generation, {**cheap, "evaluation.generate": False}, out=tmp_path / "b")
    frame = comparison([tmp_path / "b"])
    assert frame.loc[0, "perplexity"] == pytest.approx(math.exp(run.summary["metrics"]["loss"]))
    (read,) = read_runs([tmp_path / "b"]).finished
    assert list(read.summary.metrics) == ["loss", "perplexity"]
    told = " ".join(command("report", tmp_path / "a").out.split())
    assert "perplexity" in told
    assert "BLEU, chrF and ROUGE-L are of 16 of 40 test inputs (evaluation.generate_limit)" in told
    page = (tmp_path / "a" / "report.html").read_text()
    assert "16 of 40 test inputs" in page
    assert "Perplexity" in page


@pytest.mark.parametrize(
    ("settings", "task", "message"),
    [
        (
            {"generate": False},
            "classification",
            r"evaluation\.generate = false: is for generation, not class",
        ),
        ({"generate_limit": 3}, "retrieval", r"evaluation\.generate_limit = 3: is for generation, not retr"),
        (
            {"generate_limit": 3, "generate": False},
            "generation",
            r"does not go with evaluation\.generate = f",
        ),
        ({"generate_limit": 0}, "generation", r"evaluation\.generate_limit"),
    ],
)
def test_what_cannot_be_written_is_refused(settings: dict[str, Any], task: str, message: str) -> None:
    method = "retrieval" if task == "retrieval" else "lora"
    with pytest.raises(RecipeError, match=message):
        load_recipe(
            {
                "evaluation": settings,
                "data": {"task": task},
                "method": {"name": method},
                "rounds": {"count": 1},
            }
        )


def test_texts_longer_than_the_context_are_refused(generation: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"max_new_tokens = 100000: .* has a context of \d+ positions$"):
        fedcustom.run(generation, {"evaluation.max_new_tokens": 100_000}, out=tmp_path / "run")


def test_clients_own_models_write_for_their_own_test_rows(generation: dict[str, Any], tmp_path: Path) -> None:
    data = {**generation["data"]}
    data.pop("test")
    generation["data"], generation["baseline"] = data, "local"
    generation["clients"] = {"partition": "iid", "count": 2, "test_fraction": 0.4}
    run = fedcustom.run(generation, out=tmp_path / "run")
    assert {*run.summary["client_mean"]} == {"loss", *TEXT_METRICS}
    assert {*run.summary["metrics"]} == {"loss"}  # of each model on all rows, for which it writes nothing
    limited = fedcustom.run(generation, {"evaluation.generate_limit": 1}, out=tmp_path / "limited")
    assert {*limited.summary["client_mean"]} == {"loss"}
