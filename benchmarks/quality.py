"""Quality with cohort training on and off: ``python -m benchmarks.quality --data ../shared/data``.

Both make the same steps, so what is left between them is rounding. The rounds are fewer than the recipes'.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fedcustom.federated.run import run_recipe
from fedcustom.recipe.recipe import load_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
RESULTS = Path(__file__).parent / "results"


def accuracy(name: str, data: Path, seed: int, rounds: int, width: int | None) -> float:
    """Accuracy on the test split after some rounds of a recipe."""
    changes: dict[str, Any] = {
        "data.source": str(data / name), "seed": seed, "rounds.count": rounds,
        "evaluation.every": rounds, "evaluation.untuned": False, "evaluation.select": "last",
        "training.logit_adjustment": 0.0,
        **({} if width is None else {"training.cohort_width": width}),
    }  # fmt: skip
    recipe = load_recipe(RECIPES / f"{name}.toml", [f"{key}={json.dumps(v)}" for key, v in changes.items()])
    with TemporaryDirectory() as folder:
        summary = run_recipe(recipe, Path(folder) / "run")
    return float(summary["metrics"]["accuracy"])


def main() -> None:
    """Measure and write ``results/quality.json`` after every run; what it holds already is not run again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, required=True, help="folder with trec/ and banking77/")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "quality.json")
    options = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = {}
    if options.out.exists():
        kept = json.loads(options.out.read_text(encoding="utf-8"))
        if (kept["rounds"], kept["torch"]) == (options.rounds, torch.__version__):
            found = kept["accuracy"]
    for name in ("trec", "banking77"):
        if not (options.data / name).is_dir():
            parser.error(f"--data: {options.data} has no folder {name}")
    for seed in range(options.seeds):
        for name in ("trec", "banking77"):
            for label, width in (("on", None), ("off", 1)):
                if len(found.get(name, {}).get(label, [])) > seed:
                    continue
                value = accuracy(name, options.data, seed, options.rounds, width)
                found.setdefault(name, {}).setdefault(label, []).append(value)
                print(f"{name}, seed {seed}, cohort training {label}: {value:.4f}", flush=True)
                content = {"rounds": options.rounds, "torch": torch.__version__, "accuracy": found}
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for name, both in found.items():
        print(name, {label: round(statistics.mean(values), 4) for label, values in both.items()})


if __name__ == "__main__":
    main()
