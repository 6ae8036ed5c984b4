"""What needs no model starts without torch: recipes are checked in well under a second."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "peft", "datasets", "pandas", "sklearn", "scipy")

LOADED = f"""
import atexit, json, resource, sys
def told():
    used = resource.getrusage(resource.RUSAGE_SELF)
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    print(json.dumps([used.ru_utime + used.ru_stime, heavy]))
atexit.register(told)
"""


def python(code: str, *arguments: str) -> tuple[float, list[str], str]:
    """Seconds of processor time that a Python process took, what it imported that is heavy, and what it wrote
    to standard error.
    """
    least = math.inf
    for _ in range(3):  # the least of three: a busy machine makes it longer, never shorter
        done = subprocess.run(
            [sys.executable, "-c", LOADED + code, *arguments],
            capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "COLUMNS": "400"},
        )  # fmt: skip
        seconds, heavy = json.loads(done.stdout.splitlines()[-1])
        least = min(least, seconds)
    return least, heavy, done.stderr


def test_recipes_need_no_torch() -> None:
    seconds, heavy, said = python("import fedcustom.recipe, fedcustom.recipe.help")
    assert heavy == [], said
    assert seconds < 1.0  # half of that on an idle machine


@pytest.mark.parametrize(
    ("command", "content", "message"),
    [
        ("run", "[training", "not TOML"),
        ("run", "[training]\nlearning_rat = 1", "did you mean 'learning_rate'"),
        ("compare", "[training]\nbatch_size = 0", "training.batch_size = 0"),
        ("run", "[method]\nname = 'lorra'", "did you mean 'lora'"),
        (
            "run",
            "[method]\nname = 'lora'\nvariant = 'flora'\n[compression]\nkind = 'int8'\ndown = true",
            "compression.down: does not go with method.variant = 'flora'",
        ),
        ("run", "", "is empty; a recipe to start from is written by: fedcustom recipe > "),
        ("recipe", "# nothing yet\n", "is empty"),
    ],
)
def test_bad_recipes_are_refused_at_once(tmp_path: Path, command: str, content: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(content)
    seconds, heavy, said = python("from fedcustom.cli.app import main\nmain()", command, str(path))
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert heavy == []
    assert seconds < 2.0  # half of that on an idle machine
