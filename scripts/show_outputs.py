"""What several generation runs wrote for the same test examples, side by side, as Markdown.

    python scripts/show_outputs.py RUN [RUN ...] --count 10 > outputs.md

The runs must share their test split. Examples are spread evenly over it, whatever the outputs are; a
reference and the text of the base model before any training stand beside those of the runs.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from fedcustom.data.examples import Example, LearningTask
from fedcustom.methods.tuning.objective import Supervised
from fedcustom.models.inference import generate
from fedcustom.models.load import load_base
from fedcustom.recipe.recipe import recorded_recipe


def predictions(run: Path) -> list[dict[str, Any]]:
    """A run's test examples with what it wrote for them."""
    lines = (run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def untuned(run: Path, sources: list[str]) -> list[str]:
    """What the run's base model writes as it was pretrained."""
    recipe = recorded_recipe(run / "recipe.toml")
    base = load_base(recipe.model, LearningTask("generation"), recipe.seed)
    prompts = Supervised(base, recipe.data).tokens([Example(source, target="") for source in sources])
    return generate(base.model, base, [prompt.source for prompt in prompts], recipe.evaluation)


def labelled(runs: list[Path]) -> dict[str, Path]:
    """The runs by what tells their paths apart."""
    if len(runs) == 1:
        return {runs[0].name: runs[0]}
    common = os.path.commonpath([run.resolve() for run in runs])
    return {run.resolve().relative_to(common).as_posix(): run for run in runs}


def one_line(text: str, longest: int = 400) -> str:
    """The text in one line, cut if it goes on and on."""
    flat = " ".join(text.split())
    return flat if len(flat) <= longest else flat[:longest] + " ..."


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a finished run")
    parser.add_argument("--count", type=int, default=10, help="how many test examples")
    arguments = parser.parse_args()
    said = {label: predictions(run) for label, run in labelled(arguments.runs).items()}
    first = next(iter(said.values()))
    if any([row["source"] for row in rows] != [row["source"] for row in first] for rows in said.values()):
        parser.error("the runs do not have the same test examples")
    recipes = [recorded_recipe(run / "recipe.toml") for run in arguments.runs]
    if any(r.model.base != recipes[0].model.base for r in recipes):
        parser.error("the runs do not have the same base model")
    count = max(1, min(arguments.count, len(first)))
    chosen = [number * len(first) // count for number in range(count)]
    before = untuned(arguments.runs[0], [first[number]["source"] for number in chosen])
    for place, number in enumerate(chosen):
        print(f"**{one_line(first[number]['source'])}**\n")
        print(f"- reference: {one_line(first[number]['references'][0])}")
        print(f"- untuned: {one_line(before[place])}")
        for name, rows in said.items():
            print(f"- {name}: {one_line(rows[number]['prediction'])}")
        print()


if __name__ == "__main__":
    main()
