"""The layout shows the architecture: each room imports from rooms below it alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fedcustom

PACKAGE = Path(fedcustom.__file__).parent

# From top to bottom; rooms on one line do not know each other.
ROOMS = [
    {"__main__"},
    {"cli", "__init__"},
    {"experiment"},
    {"report"},
    {"deployment"},
    {"api", "library"},
    {"federated"},
    {"recipe"},
    {"transport"},
    {"updates"},
    {"methods"},
    {"simulation"},
    {"aggregation", "training"},
    {"models"},
    {"data"},
    {"evaluation"},
    {"core"},
]
LEVELS = {name: -level for level, names in enumerate(ROOMS) for name in names}


def imports(path: Path) -> set[str]:
    """The rooms that a file imports, at its top or inside functions."""
    parts = path.relative_to(PACKAGE).parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            base = [*parts[: len(parts) - node.level], *(node.module or "").split(".")]
            base = [part for part in base if part]
            found |= {base[0]} if base else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedcustom"):
            found.add((node.module or "").split(".")[1])
    return found


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_imports_go_down(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in LEVELS, f"{room} has no place in the plan"
    for other in imports(path) - {room}:
        if room == "__init__":
            continue
        assert LEVELS[other] < LEVELS[room], f"{room} imports {other}, which is not below it"


def test_nothing_is_pickled_or_evaluated() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & {
                    "pickle",
                    "dill",
                    "cloudpickle",
                    "marshal",
                }, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec"}, path
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "torch"
            ):
                assert node.attr not in {"load", "save"}, path
