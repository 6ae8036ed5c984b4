"""The layout shows the architecture: a package imports from those below it, and no test from another test."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import fedcustom

PACKAGE = Path(fedcustom.__file__).parent
TESTS = Path(__file__).parent

LAYERS = [
    {"__main__"},
    {"cli", "__init__"},
    {"watch"},
    {"experiment"},
    {"report", "preflight"},
    {"deployment", "serving"},
    {"api", "library", "trainers"},
    {"exporting", "audit", "proposal", "doctor"},
    {"federated"},
    {"recipe"},
    {"transport"},
    {"updates"},
    {"methods"},
    {"simulation"},
    {"aggregation", "training"},
    {"privacy"},
    {"models"},
    {"data"},
    {"evaluation"},
    {"core"},
]
"""Packages and top modules from top to bottom; those on one line do not import each other."""

LEVELS = {name: -level for level, names in enumerate(LAYERS) for name in names}

TEST_MODULES = {"conftest"} | {path.stem for path in TESTS.rglob("test_*.py")}


def modules(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """The packages of ``fedcustom`` that a file imports, at its top or inside functions."""
    parts = path.relative_to(PACKAGE).parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            base = [*parts[: len(parts) - node.level], *(node.module or "").split(".")]
            base = [part for part in base if part]
            found |= {base[0]} if base else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fedcustom":
            _, *rest = (node.module or "").split(".")
            found |= {rest[0]} if rest else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {name[1] if len(name) > 1 else "__init__" for name in names if name[0] == "fedcustom"}
    return found


@pytest.mark.parametrize("path", modules(PACKAGE), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    package = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert package in LEVELS, f"{package} has no place among the layers"
    for other in imports(path) - {package}:
        if package == "__init__":
            continue
        assert LEVELS[other] < LEVELS[package], f"{package} imports {other}, which is not below it"


@pytest.mark.parametrize("path", modules(TESTS), ids=lambda path: str(path.relative_to(TESTS)))
def test_no_test_module_imports_another(path: Path) -> None:
    """What several of them need stands in ``helpers``, or is a fixture of a ``conftest.py``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(alias.name for alias in node.names)]
        for name in names:
            assert not set(name.split(".")) & TEST_MODULES, f"imports {name}"


def test_the_tests_mirror_the_package() -> None:
    """A folder of tests has the name of a package, of its subpackage, or of a folder beside it."""
    beside = {"helpers", "benchmarks", "scripts"}
    for path in TESTS.rglob("test_*.py"):
        folder = path.parent.relative_to(TESTS)
        known = not folder.parts or folder.parts[0] in beside or (PACKAGE / folder).is_dir()
        assert known, f"{path.relative_to(TESTS)}: fedcustom has no package {folder}"


def test_nothing_is_pickled_or_evaluated() -> None:
    for path in modules(PACKAGE):
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


def test_methods_are_named_in_their_own_package_and_the_recipe_alone() -> None:
    """Elsewhere a method answers for itself; retrieval is also the name of what is learnt."""
    names = "lora|prefix|soft_prompt|adapter|ia3|bitfit|ln_tuning|full|distillation|prompt_engineering|probe"
    named = re.compile(rf"FIT_HEAD|LABEL_COUNTS|[\"'](?:{names})[\"']")
    found = [
        f"{file.relative_to(PACKAGE)}: {match.group()}"
        for file in PACKAGE.rglob("*.py")
        if file.relative_to(PACKAGE).parts[0] not in ("methods", "recipe")
        for match in named.finditer(file.read_text(encoding="utf-8"))
    ]
    assert not found
