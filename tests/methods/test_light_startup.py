"""A run reaches its first step without what training does not need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HEAVY = (
    *("pandas", "datasets", "matplotlib", "ray", "mlflow", "wandb", "tensorboard", "nvflare", "lancedb"),
    *("fastapi", "fedcustom.report.page"),
)

TO_FIRST_STEP = f"""
import json, os, sys, torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
def told(*_):
    print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]), flush=True)
    os._exit(0)
register_optimizer_step_pre_hook(told)
from fedcustom.cli.app import main
main()
"""

ROWS = [
    {"text": f"{thing} number {number}", "label": label}
    for number in range(12)
    for thing, label in (("a warm meal", "good"), ("a long wait", "bad"))
]


def write_recipe(folder: Path, method: str) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    path = folder / "recipe.toml"
    path.write_text(
        f"""
[model]
base = "builtin:minilm"
[data]
source = "{folder / "rows.jsonl"}"
text = "{{text}}"
label = "label"
max_length = 16
[clients]
partition = "iid"
count = 2
[method]
name = "{method}"
[rounds]
count = 1
"""
    )
    return path


def python(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_first_step_comes_without_heavy_libraries(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "lora")
    said = python("-c", TO_FIRST_STEP, "run", str(recipe), "--out", str(tmp_path / "run"), "--quiet")
    assert json.loads(said.splitlines()[-1]) == []


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom fedcustom.cli.app import app\n"
        "try:\n    app(args=['--help'])\nexcept SystemExit:\n    pass\n"
        "print([n for n in ('torch', 'transformers', 'numpy', 'pandas') if n in sys.modules])"
    )
    assert python("-c", code).strip().splitlines()[-1] == "[]"
