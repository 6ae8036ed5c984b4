"""The reference of the public Python names, by mkdocstrings from their docstrings."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "fedcustom"

BEGINNING = """# Python names

What `import fedcustom` offers. [Python interface](../python.md) shows how the names are used together;
parts of other modules that plug-ins need are described in [architecture](../architecture.md) and
[contributing](../repository/CONTRIBUTING.md).
"""

ROLE = re.compile(r":(?:class|func|meth|attr|mod|data):<code>~?\.*([\w.]+)</code>")

SETTINGS = {"Recipe"}
"""Classes whose fields are in the reference of the recipe; of them only methods are listed."""


def page() -> str:
    """One entry for each public name.

    Raises:
        SystemExit: a public name, or a public member of a public class, is not documented.
    """
    if missing := undocumented():
        raise SystemExit(f"error: no docstring: {', '.join(missing)}")
    entries = [f"\n::: fedcustom.{home}.{name}\n{_options(name)}" for name, home in sorted(homes().items())]
    return BEGINNING + "".join(entries)


def homes() -> dict[str, str]:
    """The module in which each name of ``fedcustom.__all__`` is defined."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    public = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    found = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
        for alias in node.names
    }
    return {name: found[name] for name in public}


def undocumented() -> list[str]:
    """The public names, and public members of public classes, without a docstring."""
    missing = []
    for name, home in homes().items():
        tree = ast.parse((PACKAGE / f"{home.replace('.', '/')}.py").read_text(encoding="utf-8"))
        node = next(node for node in tree.body if getattr(node, "name", None) == name)
        assert isinstance(node, ast.ClassDef | ast.FunctionDef)
        missing += [] if ast.get_docstring(node) else [f"fedcustom.{name}"]
        if isinstance(node, ast.ClassDef):
            missing += [
                f"fedcustom.{name}.{member.name}"
                for member in node.body
                if isinstance(member, ast.FunctionDef)
                and not member.name.startswith("_")
                and not ast.get_docstring(member)
            ]
    return missing


def without_roles(html: str) -> str:
    """Sphinx's roles in docstrings as plain code, with the last part of the name."""
    return ROLE.sub(lambda match: f"<code>{match[1].rpartition('.')[2]}</code>", html)


def _options(name: str) -> str:
    if name not in SETTINGS:
        return ""
    return "    options:\n      members: [settled, for_method]\n"
