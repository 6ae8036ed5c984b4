"""The held-out score of every candidate of a finished prompt selection, to see how good the choice was.

    python scripts/score_candidates.py RUN [RUN ...]

Reads each run's recipe and scores all its candidates, those bred on the way too, on the test split and on the
clients' own test parts together, neither of which the selection has seen. Prints a line a candidate, best
first, then what was chosen beside the best and the mean. The figures of a run are in its ``candidates.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from fedcustom.core.files import write_json
from fedcustom.data.build import build_data
from fedcustom.data.examples import Example
from fedcustom.federated.build import make_method
from fedcustom.federated.run_directory import Checkpoints
from fedcustom.methods.prompt_engineering.selection import Selection
from fedcustom.models.load import load_base
from fedcustom.recipe.recipe import recorded_recipe


def accuracy(method: Selection, candidate: Any, examples: list[Example]) -> float:
    """The share of examples that a candidate gets right."""
    chosen = method.scorer.predict(candidate, examples, texts=False).scores.argmax(axis=1)
    return float((chosen == np.array([example.label for example in examples])).mean())


def score(run: Path) -> dict[str, Any]:
    """All candidates of a run with their accuracies."""
    recipe = recorded_recipe(run / "recipe.toml")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    data = build_data(recipe.data, recipe.clients, recipe.seed, recipe.public)
    base = load_base(recipe.model, data.task, recipe.seed, head=False)
    method = make_method(recipe, base, data)
    assert isinstance(method, Selection)
    state = Checkpoints(run / "checkpoints").load(summary["best_round"]).state
    pooled = [example for client in data.clients.values() for example in client.test]
    rows = []
    for number in [*range(len(method.pool)), *map(int, state.values["bred"])]:
        candidate = method.candidate(state, number)
        said = {"number": number, "template": candidate.template, "labels": list(candidate.labels)}
        said["test"] = accuracy(method, candidate, data.test)
        said["clients"] = accuracy(method, candidate, pooled) if pooled else None
        rows.append(said)
    chosen = method.best(state)
    bytes_ = summary["bytes"]
    return {
        "chosen": next(row for row in rows if row["number"] == chosen),
        "candidates": sorted(rows, key=lambda row: -row["test"]),
        "examples": {"test": len(data.test), "clients": len(pooled)},
        "bytes_a_client": (bytes_["up_total"] + bytes_["down_total"]) / len(data.clients),
        "bytes_up_a_client": bytes_["up_total"] / len(data.clients),
    }


def main() -> None:
    """Score the runs and print their tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--all", action="store_true", help="print every candidate")
    arguments = parser.parse_args()
    for run in arguments.runs:
        found = score(run)
        write_json(run / "candidates.json", found)
        print(run)
        if arguments.all:
            for row in found["candidates"]:
                print(f"  {row['test']:.3f} {row['clients'] or 0:.3f}  {row['template']!r} {row['labels']}")
        for part in ("test", "clients"):
            values = [row[part] for row in found["candidates"] if row[part] is not None]
            if values:
                print(
                    f"  {part} ({found['examples'][part]} examples): chosen {found['chosen'][part]:.3f}, "
                    f"best {max(values):.3f}, mean {np.mean(values):.3f}, worst {min(values):.3f}"
                )
        sent, up = found["bytes_a_client"], found["bytes_up_a_client"]
        print(f"  bytes a client in all: {sent:.0f}, {up:.0f} of them up")


if __name__ == "__main__":
    main()
