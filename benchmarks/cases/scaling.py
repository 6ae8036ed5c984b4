"""(d) Scaling: seconds and memory of one run over ten to ten thousand clients, ten of them a round."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..harness import HERE
from ..jobs import write_random_gpt2, write_random_texts

COUNTS = (10, 100, 1_000, 10_000)


def measure(counts: tuple[int, ...] = COUNTS, *, rounds: int = 5, threads: int = 1) -> dict[str, Any]:
    """Each in a process of its own: a tiny decoder, three texts of 32 tokens a client."""
    found = {}
    with tempfile.TemporaryDirectory() as space:
        base = write_random_gpt2(Path(space) / "base", vocabulary=512, layers=2, width=64, heads=2)
        for count in counts:
            print(f"  {count} clients", flush=True)
            found[str(count)] = _one(Path(space) / str(count), base, count, rounds, threads)
    return found


def _one(folder: Path, base: Path, clients: int, rounds: int, threads: int) -> dict[str, Any]:
    from fedcustom.recipe.recipe import parse_recipe, to_toml

    folder.mkdir()
    write_random_texts(folder / "train.jsonl", rows=3 * clients, tokens=32, vocabulary=512)
    write_random_texts(folder / "test.jsonl", rows=4, tokens=32, vocabulary=512)
    recipe = {
        "model": {"base": str(base)},
        "data": {
            "source": str(folder), "task": "generation", "test": "test", "development": "test",
            "prompt": "{source}", "target": " {target}", "max_length": 8, "max_target_length": 32,
        },
        "clients": {"partition": "iid", "count": clients, "test_fraction": 0.0},
        "method": {"name": "prefix", "length": 8, "init": "random"},
        "training": {"batch_size": 8, "learning_rate": 0.01},
        "rounds": {"count": rounds, "clients_per_round": 10},
        "evaluation": {"every": rounds, "untuned": False, "select": "last", "max_new_tokens": 1},
    }  # fmt: skip
    (folder / "recipe.toml").write_text(to_toml(parse_recipe(recipe, "scaling")), encoding="utf-8")
    result = folder / "result"
    result.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(
        [sys.executable, "-m", "benchmarks.ours", str(folder), str(result)],
        cwd=HERE.parent, env=environment, check=True, capture_output=True,
    )  # fmt: skip
    told = json.loads((result / "result.json").read_text(encoding="utf-8"))
    return {
        "seconds_a_round": sum(told["rounds"][1:]) / max(1, len(told["rounds"]) - 1),
        "total_seconds": told["total"],
        "memory_bytes": told["memory"],
    }
