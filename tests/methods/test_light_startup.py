"""A run reaches its first step without libraries that training does not need, and with the same result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HEAVY = (
    *("scipy", "sklearn", "pandas", "datasets", "matplotlib", "torchao"),
    *("bitsandbytes", "torch._dynamo", "torch._inductor", "torch.distributed.tensor"),
    *("mlflow", "wandb", "tensorboard", "nvflare", "lancedb", "fedcustom.report.page"),
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


def python(*arguments: str, light: str = "1") -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "FEDCUSTOM_LIGHT_IMPORTS": light, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_first_step_comes_without_heavy_libraries(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "lora")
    said = python("-c", TO_FIRST_STEP, "run", str(recipe), "--out", str(tmp_path / "run"), "--quiet")
    assert json.loads(said.splitlines()[-1]) == []


def test_the_result_is_the_same_with_usual_imports(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "lora")
    for light in ("0", "1"):
        out = str(tmp_path / light)
        python("-m", "fedcustom", "run", str(recipe), "--out", out, "--quiet", "--no-check", light=light)
    for file in ("model/adapter_model.safetensors", "predictions.jsonl"):
        assert (tmp_path / "0" / file).read_bytes() == (tmp_path / "1" / file).read_bytes(), file


LIGHTLY = """
from fedcustom.models.light_imports import light_imports
from fedcustom.models.settings import ModelSettings
import builtins
usual = builtins.__import__
with light_imports(ModelSettings(base="builtin:minilm")):
    import transformers.loss.loss_for_object_detection as detection
    import sys
    assert "scipy" not in sys.modules and "torch._dynamo" not in sys.modules
assert builtins.__import__ is usual
print(detection.linear_sum_assignment([[4.0, 1.0], [2.0, 9.0]])[1].tolist())
import torch
print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item())
"""


def test_what_was_put_off_comes_when_it_is_used() -> None:
    """The names that a library took meanwhile work afterwards, and so does torch's compiler."""
    assert python("-c", LIGHTLY).split("\n")[:2] == ["[1, 0]", "2.0"]


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom fedcustom.cli.app import app\n"
        "try:\n    app(args=['--help'])\nexcept SystemExit:\n    pass\n"
        "print([n for n in ('torch', 'transformers', 'numpy', 'pandas') if n in sys.modules])"
    )
    assert python("-c", code).strip().splitlines()[-1] == "[]"
