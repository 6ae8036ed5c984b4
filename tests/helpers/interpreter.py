"""Python processes that have heard of nothing: without this package, and without the seconds of its imports.

A test that loads a saved model elsewhere, or kills a run, needs a process of its own. Importing torch,
transformers and peft takes such a process five seconds of processor time. One process a session imports them,
and is forked for each request, before any of them was used: the fork knows these libraries and nothing else.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

PARENT = """
import json, os, sys
import peft, safetensors.torch, torch, transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
assert "fedcustom" not in sys.modules
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    os._exit(0)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
for number, name in ((1, "stdout"), (2, "stderr")):
    os.dup2(os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
os.environ.clear()
os.environ.update(asked["env"])
os.chdir(asked["cwd"])
sys.argv = ["-c", *asked["arguments"]]
sys.path[:0] = asked["path"]
exec(compile(asked["code"], "<string>", "exec"), {"__name__": "__main__"})
"""

NOWHERE = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://localhost:9"}
"""The libraries read these when they are imported: no process reaches a hub."""


def run_python(
    code: str,
    *arguments: str,
    cwd: Path | None = None,
    path: tuple[str, ...] = (),
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run code in a process that has imported torch, transformers and peft, but not this package, and that
    reaches no hub and finds no model in a cache.

    ``path`` is put before the folders from which modules are imported, ``env`` into the environment.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = {name: str(Path(folder) / name) for name in ("stdout", "stderr")}
        asked = {
            "code": code,
            "arguments": arguments,
            "cwd": str(cwd or Path.cwd()),
            "path": path,
            "env": {**os.environ, **_home(), **(env or {})},
            **files,
        }
        parent = _parent()
        assert parent.stdin is not None
        assert parent.stdout is not None
        parent.stdin.write(json.dumps(asked) + "\n")
        parent.stdin.flush()
        said = parent.stdout.readline()
        assert said, "the parent of Python processes has died"
        out, error = (Path(file).read_text(encoding="utf-8", errors="replace") for file in files.values())
    return subprocess.CompletedProcess(["python", *arguments], int(said), out, error)


@cache
def _home() -> dict[str, str]:
    """Where to find no model."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return {**NOWHERE, "HF_HOME": folder.name}


@cache
def _parent() -> subprocess.Popen[str]:
    """The process that is forked; it ends with this one, whose pipe it reads."""
    made = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PARENT],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **_home()},
    )  # fmt: skip
    atexit.register(made.wait)
    assert made.stdin is not None
    atexit.register(made.stdin.close)
    return made
