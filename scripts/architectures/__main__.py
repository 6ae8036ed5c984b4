"""The architecture matrix: every method that trains weights on some seventy kinds of tiny models.

    python -m scripts.architectures --jobs 2 --write docs/model_types.md
    python -m scripts.architectures --only gpt2,xlnet

Each cell is trained twice through ``fedcustom.run``, with the clients in one batch and one after the other,
and the two are compared. Ends with code 1 if any cell gave unlike numbers, or failed with another error than
a refusal of one line.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from .matrix import METHODS, Outcome, outcome, tasks_of
from .models import ALL

Cells = dict[tuple[str, str], dict[str, Outcome]]
"""From an architecture and a task to each method's outcome."""

Cell = tuple[str, str]
"""What the table says of an outcome, and the reason."""

MARKS = {"together": "together", "alone": "alone", "refused": "-", "wrong": "WRONG", "failed": "FAILED"}

BEGIN, END = "<!-- matrix: begin -->", "<!-- matrix: end -->"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="names of architectures, by commas; default: all")
    parser.add_argument("--methods", help="columns, by commas; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, of one thread each")
    parser.add_argument("--check-exports", action="store_true", help="some 10 s more a cell")
    parser.add_argument("--write", type=Path, help="page whose table to bring up to date; other cells stay")
    chosen = parser.parse_args()
    names = chosen.only.split(",") if chosen.only else list(ALL)
    if unknown := [name for name in names if name not in ALL]:
        parser.error(f"--only: unknown: {', '.join(unknown)}; allowed are {', '.join(ALL)}")
    methods = chosen.methods.split(",") if chosen.methods else list(METHODS)
    if unknown := [name for name in methods if name not in METHODS]:
        parser.error(f"--methods: unknown: {', '.join(unknown)}; allowed are {', '.join(METHODS)}")
    if chosen.jobs < 1:
        parser.error(f"--jobs {chosen.jobs}: 1 or more")
    if chosen.write and not chosen.write.is_file():
        parser.error(f"--write {chosen.write}: no such page")
    cells: Cells = {}
    with ProcessPoolExecutor(chosen.jobs, initializer=_one_thread) as pool:
        waiting = {
            pool.submit(row, name, task, methods, chosen.check_exports): (name, task)
            for name in names
            for task in tasks_of(name)
        }
        for done in as_completed(waiting):
            name, task = waiting[done]
            cells[name, task] = done.result()
            for method, found in cells[name, task].items():
                print(f"{name} {task} {method}: {found.how} {found.reason}".rstrip(), flush=True)
            ordered = {key: cells[key] for one in names for key in sorted(cells) if key[0] == one}
            if chosen.write:
                write_table(chosen.write, ordered)
    faults = [
        f"{name} {task} {method}: {found.how} {found.reason}"
        for (name, task), found_by in ordered.items()
        for method, found in found_by.items()
        if found.how in ("wrong", "failed")
    ]
    print(f"{sum(map(len, cells.values()))} cells, {len(faults)} faults", *faults, sep="\n", file=sys.stderr)
    return 1 if faults else 0


def write_table(page: Path, cells: Cells) -> None:
    """Bring the table of a page up to date; cells that are not among these, and the other text, stay."""
    text = page.read_text(encoding="utf-8")
    before, old, after = (
        text.partition(BEGIN)[0],
        text.partition(BEGIN)[2].partition(END)[0],
        text.partition(END)[2],
    )
    shown = read_table(old)
    for key, found_by in cells.items():
        shown.setdefault(key, {}).update(
            {method: in_words(found, key[0]) for method, found in found_by.items()}
        )
    page.write_text(f"{before}{BEGIN}\n\n{table(shown)}\n{END}{after}", encoding="utf-8")


def in_words(found: Outcome, name: str) -> Cell:
    """What the table says of an outcome."""
    mark = MARKS[found.how] + ("" if found.padding else "*")
    return mark, general(found.reason, name) if found.reason else ""


def read_table(text: str) -> dict[tuple[str, str], dict[str, Cell]]:
    """The cells of a table that :func:`table` wrote."""
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    rows = [
        [part.strip() for part in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"
    ]
    if not rows:
        return {}
    found: dict[tuple[str, str], dict[str, Cell]] = {}
    for name, task, *marks in rows[2:]:
        found[name, task] = {}
        for method, mark in zip(rows[0][2:], marks, strict=True):
            if mark:
                shown, _, number = mark.partition(" (")
                found[name, task][method] = shown, reasons[number.rstrip(")")] if number else ""
    return found


def row(name: str, task: str, methods: list[str], check: bool) -> dict[str, Outcome]:
    """The methods on one architecture."""
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for method in methods:
            found[method] = outcome(name, method, task, Path(folder), check=check)
            for run in Path(folder).glob(f"{name}-{task}-*"):
                shutil.rmtree(run)
        return found


def table(cells: Mapping[tuple[str, str], Mapping[str, Cell]]) -> str:
    """The table in Markdown, and the reasons of refusals, each once. Cells that were not run are empty."""
    lines = ["| architecture | task | " + " | ".join(METHODS) + " |", "|" + "---|" * (len(METHODS) + 2)]
    reasons: dict[str, int] = {}
    for (name, task), found_by in cells.items():
        shown = []
        for method in METHODS:
            mark, reason = found_by.get(method, ("", ""))
            shown.append(f"{mark} ({reasons.setdefault(reason, len(reasons) + 1)})" if reason else mark)
        lines.append(f"| {name} | {task} | " + " | ".join(shown) + " |")
    listed = [f"{number}. {text}" for text, number in reasons.items()]
    return "\n".join([*lines, "", *listed, ""])


def general(reason: str, name: str) -> str:
    """A reason without the model's name and figures, so that alike ones are listed once."""
    text = re.sub(rf"\b{re.escape(name)}\b", "MODEL", reason)
    text = re.sub(r"its \S+ code", "its code", text)
    return re.sub(r"\(a (loss|gradient)[^)]*\)", r"(a \1 that differs)", text)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main())
