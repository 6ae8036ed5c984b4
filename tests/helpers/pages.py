"""Blocks of pages that are marked to be run, and their run in a fresh process.

A block is marked by a comment in the line before its fence, which readers do not see:

- ``<!-- run -->``: ``bash`` and ``python`` blocks are executed, in the page's order; Python blocks share one
  namespace;
- ``<!-- run: NAME -->``: the block is written to the file NAME;
- ``<!-- run hidden`` and lines of ``bash`` up to ``-->``: executed, and not shown;
- ``<!-- run: slow -->`` anywhere: the page's run takes over 20 seconds.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SLOW = "<!-- run: slow -->"
BLOCK = re.compile(
    r"^<!-- run(?:: (?P<file>\S+))? -->\n```(?P<language>\w+)[^\n]*\n(?P<shown>.*?)^```"
    r"|^<!-- run hidden\n(?P<hidden>.*?)^-->",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A block of a page: its language, its text, the file to write it to, and its line on the page."""

    language: str
    text: str
    file: str | None
    line: int


def blocks(page: Path) -> list[Block]:
    """The marked blocks of a page, in order."""
    text, found = page.read_text(encoding="utf-8"), []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        if match["hidden"] is not None:
            found.append(Block("bash", match["hidden"], None, line))
        else:
            found.append(Block(match["language"], match["shown"], match["file"], line))
    return found


def is_slow(page: Path) -> bool:
    """Whether the page says that its run takes over 20 seconds."""
    return SLOW in page.read_text(encoding="utf-8")


DRIVER = """
import pathlib, subprocess, sys
sys.path.insert(0, {helpers!r})
from helpers.pages import blocks
namespace = {{"__name__": "page"}}
page = pathlib.Path({page!r})
for block in blocks(page):
    print(f"--- {{page.name}}, line {{block.line}}", flush=True)
    if block.file is not None:
        pathlib.Path(block.file).write_text(block.text, encoding="utf-8")
    elif block.language == "python":
        exec(compile(block.text, f"{{page.name}}, line {{block.line}}", "exec"), namespace)
    elif block.language == "bash":
        subprocess.run(["bash", "-euo", "pipefail", "-c", block.text], check=True)
    else:
        raise SystemExit(f"{{page.name}}, line {{block.line}}: cannot run a block of {{block.language!r}}")
"""


def run_page(page: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a page's blocks in a folder that has the recipes of the repository, in a fresh process."""
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    driver = folder / "driver.py"
    driver.write_text(DRIVER.format(helpers=str(ROOT / "tests"), page=str(page)), encoding="utf-8")
    return run_python(driver, folder)


def run_python(file: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a Python file in a folder, with this environment's commands on the path."""
    source = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return subprocess.run(
        [sys.executable, str(file)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": source, "PATH": path, "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
