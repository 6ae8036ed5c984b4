"""Notebooks, read and checked by hand: their JSON, and their code cells as one Python file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")
KEYS = {
    "markdown": {"cell_type", "id", "metadata", "source"},
    "code": {"cell_type", "id", "metadata", "source", "outputs", "execution_count"},
}


def problems(content: Any) -> list[str]:
    """What in a notebook is not nbformat 4.5 as committed here: without outputs and magics."""
    found = []
    if set(content) != {"cells", "metadata", "nbformat", "nbformat_minor"}:
        found.append(f"keys {sorted(content)}")
    if (content.get("nbformat"), content.get("nbformat_minor")) != (4, 5):
        found.append("not nbformat 4.5")
    ids = [cell.get("id", "") for cell in content["cells"]]
    found += [f"cell id {name!r}" for name in ids if not ID.fullmatch(name)]
    found += ["cell ids are not unique"] if len(set(ids)) < len(ids) else []
    for number, cell in enumerate(content["cells"]):
        kind, source = cell.get("cell_type"), cell.get("source")
        if set(cell) != KEYS.get(kind, set()):
            found.append(f"cell {number}: type {kind!r} with keys {sorted(cell)}")
            continue
        if not isinstance(source, list) or not all(isinstance(line, str) for line in source):
            found.append(f"cell {number}: source is no list of lines")
        elif any(not line.endswith("\n") for line in source[:-1]) or source[-1:] == [""]:
            found.append(f"cell {number}: lines without their ends")
        if kind == "code" and (cell["outputs"] or cell["execution_count"] is not None):
            found.append(f"cell {number}: has outputs")
        if kind == "code" and any(line.lstrip().startswith(("%", "!")) for line in source):
            found.append(f"cell {number}: has a magic, which is no Python")
    return found


def as_script(path: Path) -> str:
    """The code cells of a notebook as one Python file, each after a line that names it."""
    content = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    return "\n".join(
        f"print('--- cell {number}')\n{''.join(c['source'])}\n" for number, c in enumerate(cells)
    )
