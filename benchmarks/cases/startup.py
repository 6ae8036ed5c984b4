"""(i) Start-up: processor seconds from the start of ``fedcustom run`` to its first training step."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..harness import HERE

TO_FIRST_STEP = """
import json, os, sys, time, torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
at = {"torch": time.process_time()}
def told(*_):
    at["first step"] = time.process_time()
    print(json.dumps(at), flush=True)
    os._exit(0)
register_optimizer_step_pre_hook(told)
import fedcustom.cli.app, fedcustom.core.environment
began = fedcustom.core.environment.restart_peak_memory
def restart():
    at["libraries"] = time.process_time()
    began()
fedcustom.core.environment.restart_peak_memory = restart
fedcustom.cli.app.main()
"""
"""A run that ends at its first step and tells the processor time at three points: torch is imported, all else
is and the run begins, and the first optimiser step.
"""

ROWS = 200


def measure(repeat: int = 5) -> dict[str, Any]:
    """LoRA on ``builtin:minilm``, two hundred short texts, ten clients; in one thread."""
    with tempfile.TemporaryDirectory() as space:
        folder = Path(space)
        recipe = _recipe(folder)
        # The first one reads files that are not in memory yet.
        told = [_once(recipe, folder / f"run-{number}") for number in range(repeat + 1)][1:]
    return {
        "median": {point: statistics.median(one[point] for one in told) for point in told[0]},
        "all": [one["first step"] for one in told],
    }


def _once(recipe: Path, out: Path) -> dict[str, float]:
    variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", TO_FIRST_STEP, "run", str(recipe), "--out", str(out), "--quiet"],
        cwd=HERE.parent, env={**os.environ, **variables}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return told


def _recipe(folder: Path) -> Path:
    things = ("a warm meal", "a quiet room", "a long wait", "a lost letter")
    rows = [{"text": f"There was {things[n % 4]}, {n}.", "label": str(n % 4 // 2)} for n in range(ROWS)]
    file, path = folder / "rows.jsonl", folder / "recipe.toml"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path.write_text(
        f"""
[model]
base = "builtin:minilm"
[data]
source = "{file}"
text = "{{text}}"
label = "label"
max_length = 32
[clients]
partition = "iid"
count = 10
[method]
name = "lora"
[rounds]
count = 1
""",
        encoding="utf-8",
    )
    return path
