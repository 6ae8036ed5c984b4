"""Write the table of packages in docs/architecture.md from the layers and the packages' docstrings.

    python scripts/architecture.py            # rewrite the table between its two markers
    python scripts/architecture.py --check    # exit with code 1 if the table is out of date

The order of the layers is ``LAYERS`` in tests/test_rooms.py, the list that the import test enforces. Each row
is the first paragraph of a package's ``__init__.py``, or of a top-level module. Subpackages follow their
package.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "fedcustom"
PAGE = ROOT / "docs" / "architecture.md"
LAYERS_FILE = ROOT / "tests" / "test_rooms.py"
BEGIN = "<!-- packages: written by scripts/architecture.py -->"
END = "<!-- end of packages -->"


def layers() -> list[list[str]]:
    """The layers from top to bottom, names within a layer in alphabetical order.

    Raises:
        SystemExit: tests/test_rooms.py assigns no ``LAYERS``.
    """
    for node in ast.parse(LAYERS_FILE.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == "LAYERS" for target in targets):
                return [sorted(names) for names in ast.literal_eval(node.value)]
    raise SystemExit(f"error: {LAYERS_FILE}: no list named LAYERS")


def summary(path: Path) -> str:
    """The first paragraph of a file's docstring on one line, roles such as ``:mod:`` removed.

    Raises:
        SystemExit: the file has no docstring.
    """
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not text:
        raise SystemExit(f"error: {path.relative_to(ROOT)}: no docstring")
    words = " ".join(text.split("\n\n")[0].split())
    for role in (":mod:", ":class:", ":func:", ":data:"):
        words = words.replace(role, "")
    return words.replace("``", "`").replace("|", r"\|")


def rows() -> Iterator[tuple[str, str]]:
    """Each package, subpackage and top-level module with its summary, from the top layer to the bottom."""
    for names in layers():
        for name in names:
            folder = PACKAGE / name
            if not folder.is_dir():
                yield f"`{name}.py`", summary(PACKAGE / f"{name}.py")
                continue
            yield f"`{name}/`", summary(folder / "__init__.py")
            for part in sorted(folder.glob("*/__init__.py")):
                yield f"&nbsp;&nbsp;`{name}/{part.parent.name}/`", summary(part)


def with_table(page: str) -> str:
    """The page with a new table between the markers.

    Raises:
        SystemExit: a marker is missing.
    """
    if BEGIN not in page or END not in page:
        raise SystemExit(f"error: {PAGE.relative_to(ROOT)}: no line {BEGIN!r}, or no line {END!r} after it")
    before, rest = page.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    lines = [f"| {name} | {text} |" for name, text in rows()]
    return "\n".join([before + BEGIN, "| package | contents |", "|---|---|", *lines, END + after])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if out of date")
    given = parser.parse_args()
    old = PAGE.read_text(encoding="utf-8")
    new = with_table(old)
    if given.check and new != old:
        print(
            f"{PAGE.relative_to(ROOT)} is out of date; run: python scripts/architecture.py", file=sys.stderr
        )
        sys.exit(1)
    if not given.check:
        PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
