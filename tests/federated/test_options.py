"""Multiple choice by likelihood in runs, against likelihoods computed with transformers and peft alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fedcustom
from fedcustom.core.errors import DataError
from helpers.rows import make_rows, write_jsonl

WORDS = ["is", "thing thing thing", "a"]


def with_options(folder: Path) -> Path:
    """Data of which each test row has its own target and two other sentences of other lengths to choose."""
    folder.mkdir()
    for split, count, seed in (("train", 30, 0), ("development", 9, 1), ("test", 20, 2)):
        rows = [
            {"source": row["source"], "target": (target := row["references"][0]), "kind": "x"}
            | {"options": [f"the {WORDS[n % 3]} is", target, "it is not a thing"][:: 1 if n % 2 else -1]}
            for n, row in enumerate(make_rows(count, seed))
        ]
        write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


def recipe_of(generation: dict[str, Any], folder: Path) -> dict[str, Any]:
    data = {**generation["data"], "source": str(folder), "options": "options"}
    data.pop("references")
    method = {"name": "lora", "rank": 2}
    return {**generation, "data": data, "method": method, "evaluation": {"generate": False}}


def mean_log_probability(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """Of the answer's tokens and the end token, one forward pass of its own."""
    given = tokenizer(prompt)["input_ids"]
    if given and given[-1] == tokenizer.eos_token_id:
        given = given[:-1]
    wanted = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([given + wanted])).logits[0].log_softmax(-1)
    places = range(len(given) - 1, len(given) + len(wanted) - 1)
    return float(torch.stack([logits[at, token] for at, token in zip(places, wanted, strict=True)]).mean())


def test_the_likeliest_option_is_that_of_a_plain_model(generation: dict[str, Any], tmp_path: Path) -> None:
    import peft
    import transformers

    recipe = recipe_of(generation, with_options(tmp_path / "data"))
    run = fedcustom.run(recipe, out=tmp_path / "run")
    base = recipe["model"]["base"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tuned: Any = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        str(run.export(tmp_path / "exported")),
    ).eval()
    rows = [json.loads(line) for line in (tmp_path / "data" / "test.jsonl").read_text().splitlines()]
    lines = [json.loads(line) for line in (run.directory / "predictions.jsonl").read_text().splitlines()]
    for model, said in ((plain, "untuned"), (tuned, "metrics")):
        chosen = []
        for row in rows:
            scores = [
                mean_log_probability(model, tokenizer, f"{row['source']} :", f" {option}")
                for option in row["options"]
            ]
            chosen.append(row["options"][scores.index(max(scores))])
        right = [text == row["target"] for text, row in zip(chosen, rows, strict=True)]
        assert run.summary[said]["choice_accuracy"] == pytest.approx(sum(right) / len(rows))
    assert [line["chosen"] for line in lines] == chosen
    assert [line["prediction"] for line in lines] == chosen
    assert 0 < sum(right) < len(rows)
    mean = run.summary["client_mean"]
    assert not mean or "choice_accuracy" in mean


def test_a_round_can_be_chosen_by_options(generation: dict[str, Any], tmp_path: Path) -> None:
    recipe = recipe_of(generation, with_options(tmp_path / "data"))
    recipe["evaluation"] = {"generate": False, "metric": "choice_accuracy"}
    run = fedcustom.run(recipe, out=tmp_path / "run")
    rows = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    assert all("choice_accuracy" in row["development"] for row in rows if row.get("development"))

    for split in ("development",):
        path = tmp_path / "data" / f"{split}.jsonl"
        texts = [json.loads(line) for line in path.read_text().splitlines()]
        path.unlink()
        write_jsonl(tmp_path / "data" / "train.jsonl", [{**t, "options": None} for t in texts])
    recipe["data"] = {k: v for k, v in recipe["data"].items() if k != "development"}
    with pytest.raises(DataError, match="no development example has options"):
        fedcustom.run(recipe, out=tmp_path / "none")


def test_options_are_not_cut(generation: dict[str, Any], tmp_path: Path) -> None:
    recipe = recipe_of(generation, with_options(tmp_path / "data"))
    recipe["data"]["max_target_length"] = 5
    with pytest.raises(
        DataError, match=r"column 'options': \d+ of 96 options are longer than data.max_target_length"
    ):
        fedcustom.run(recipe, out=tmp_path / "run")


def test_each_clients_own_model_chooses(generation: dict[str, Any], tmp_path: Path) -> None:
    recipe = recipe_of(generation, with_options(tmp_path / "data")) | {"baseline": "local"}
    run = fedcustom.run(recipe, out=tmp_path / "run")
    assert 0 <= run.summary["metrics"]["choice_accuracy"] <= 1
