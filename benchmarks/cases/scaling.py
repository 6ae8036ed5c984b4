"""(d) Scaling: seconds and memory of one run over ten to a million clients, ten of them a round."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..harness import HERE
from ..jobs import write_random_gpt2, write_random_texts

COUNTS = (10, 100, 1_000, 10_000)
"""Clients of three texts of 32 tokens each."""

SKEWED = (10_000, 100_000, 1_000_000)
"""Clients of two texts of 12 tokens on average, by ``quantity`` and by a column of owners."""

QUANTITY = {"partition": "quantity", "alpha": 5.0, "minimum_examples": 1}
OWNERS = {"partition": "natural", "column": "owner"}


def measure(
    counts: tuple[int, ...] = COUNTS,
    *,
    skewed: tuple[int, ...] = SKEWED,
    rounds: int = 5,
    threads: int = 1,
) -> dict[str, Any]:
    """Each in a process of its own, with a tiny decoder."""
    found: dict[str, Any] = {"clients": {}, "quantity": {}, "owners": {}}
    with tempfile.TemporaryDirectory() as space:
        base = write_random_gpt2(Path(space) / "base", vocabulary=512, layers=2, width=64, heads=2)
        runs = [("clients", count, {"partition": "iid"}, 3, 32) for count in counts]
        runs += [(kind, n, how, 2, 12) for kind, how in SKEW.items() for n in skewed]
        for kind, count, how, rows, tokens in runs:
            print(f"  {count} clients, {how['partition']}", flush=True)
            folder = Path(space) / f"{kind}-{count}"
            found[kind][str(count)] = _one(folder, base, count, how, (rows, tokens), rounds, threads)
            shutil.rmtree(folder)
    return found


SKEW: dict[str, dict[str, Any]] = {"quantity": QUANTITY, "owners": OWNERS}


def _one(
    folder: Path,
    base: Path,
    clients: int,
    how: dict[str, Any],
    texts: tuple[int, int],
    rounds: int,
    threads: int,
) -> dict[str, Any]:
    from fedcustom.recipe.recipe import parse_recipe, to_toml

    rows, tokens = texts
    folder.mkdir()
    owners = clients if how["partition"] == "natural" else 0
    write_random_texts(
        folder / "train.jsonl", rows=rows * clients, tokens=tokens, vocabulary=512, owners=owners
    )
    write_random_texts(folder / "test.jsonl", rows=4, tokens=tokens, vocabulary=512)
    recipe = {
        "model": {"base": str(base)},
        "data": {
            "source": str(folder), "task": "generation", "test": "test", "development": "test",
            "prompt": "{source}", "target": " {target}", "max_length": 8, "max_target_length": 32,
        },
        "clients": {**how, "test_fraction": 0.0, **({} if owners else {"count": clients})},
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
