"""The notebooks in examples/: their format, and their code on small settings in a fresh process."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from helpers.notebooks import as_script, problems
from helpers.pages import ROOT, run_python

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def test_there_are_three() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["compare_methods", "quickstart", "retrieval"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_format(path: Path) -> None:
    assert problems(json.loads(path.read_text(encoding="utf-8"))) == []
    ast.parse(as_script(path))


def test_what_is_not_the_format_is_found() -> None:
    content = json.loads(NOTEBOOKS[0].read_text(encoding="utf-8"))
    code = next(cell for cell in content["cells"] if cell["cell_type"] == "code")
    code |= {"outputs": [{}], "source": ["%matplotlib inline"], "id": "a b"}
    found = problems(content | {"nbformat_minor": 4})
    assert [part for part in ("4.5", "'a b'", "outputs", "magic") if part in " ".join(found)] == [
        *("4.5", "'a b'", "outputs", "magic")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_code_runs(path: Path, tmp_path: Path) -> None:
    if path.stem == "retrieval":
        pytest.importorskip("lancedb", reason="needs lancedb: pip install 'fedcustom[retrieval]'")
    file = tmp_path / "notebook.py"
    file.write_text(as_script(path), encoding="utf-8")
    done = run_python(file, tmp_path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
