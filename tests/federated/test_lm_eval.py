"""An exported adapter is scored by EleutherAI's evaluation harness as it is by the run itself.

The harness is no part of the development environment: pip install lm_eval -c constraints.txt
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fedcustom
from helpers.rows import write_jsonl

TASK = """task: two_lines
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{source}}}} :"
doc_to_choice: "{{{{options}}}}"
doc_to_target: "{{{{options.index(target)}}}}"
target_delimiter: " "
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_the_harness_takes_an_exported_adapter(generation: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs lm_eval: pip install lm_eval -c constraints.txt")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    rows = [
        {"source": "kind place thing river", "target": "the river is a place", "options": options}
        for options in (
            ["the river is a place", "a place the is river"],
            ["the the the the the", "the river is a place"],
        )
    ]
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", rows * 6)
    write_jsonl(folder / "test.jsonl", rows)
    data = {**generation["data"], "source": str(folder), "options": "options", "development": "test"}
    data.pop("references")
    recipe = {
        **generation,
        "data": data,
        "method": {"name": "lora", "rank": 8},
        "evaluation": {"generate": False},
    }
    recipe["training"] = {"batch_size": 4, "learning_rate": 0.03, "local_steps": 40}
    run = fedcustom.run(recipe, out=tmp_path / "run")
    exported = run.export(tmp_path / "exported")

    (tmp_path / "task.yaml").write_text(TASK.format(file=folder / "test.jsonl"))
    found = simple_evaluate(
        model="hf",
        model_args=f"pretrained={recipe['model']['base']},peft={exported}",
        tasks=["two_lines"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        log_samples=True,
    )
    said = [json.loads(line) for line in (run.directory / "predictions.jsonl").read_text().splitlines()]
    assert run.summary["metrics"]["choice_accuracy"] == 1
    assert found["results"]["two_lines"]["acc,none"] == 1
    assert [line["chosen"] for line in said] == [row["target"] for row in rows]
