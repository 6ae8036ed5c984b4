"""Paths in a recipe: those in a file are relative to it, and a run remembers all of them absolutely."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import RecipeError
from ..data.files import ENDINGS
from ..data.settings import is_template

if TYPE_CHECKING:
    from .recipe import Recipe

NAMED = {
    "model": ("base",),
    "data": ("source",),
    "public": ("source",),
    "method": ("generator", "client_models"),
}
"""Settings that hold a path or another name: a hub id, or something built in."""

FILES = {
    "data": ("chat_template",),
    "method": ("instructions_file", "public_text"),
    "tracking": ("uri",),
}
"""Settings that hold a path, or an address with its scheme, and nothing else."""


def beside(values: Mapping[str, Any], folder: Path, where: str, *, from_here: bool = False) -> dict[str, Any]:
    """A recipe file's tables with every relative path read as a path from the file's ``folder``, and made
    absolute; with ``from_here``, made relative to the current folder instead, so that the tables do not
    depend on the machine.

    A name that may be a hub id is a path where there is such a file or folder beside the recipe.

    Raises:
        RecipeError: a path leads somewhere from the current folder, but nowhere from the recipe's.
    """

    def resolve(key: str, name: str, is_file: bool) -> str:
        given = _expanded(name)
        if given.is_absolute():
            return str(given)
        there = _joined(folder, given)
        shown = os.path.relpath(there) if from_here else str(there)
        if os.path.exists(there):
            return shown
        if os.path.exists(given):
            better = os.path.relpath(given, folder)
            raise RecipeError(
                f"{where}: {key} = {name!r}: paths are relative to the recipe, and there is no such file or "
                f"folder beside it; from the recipe, the one in the current folder is {better!r}"
            )
        return shown if is_file or _is_path(name) else name

    result = _changed(values, resolve)
    if isinstance(tables := values.get("compare"), Mapping):
        result["compare"] = {
            name: _changed(table, resolve) if isinstance(table, Mapping) else table
            for name, table in tables.items()
        }
    return result


def existing(values: Mapping[str, Any]) -> dict[str, Any]:
    """Tables with each relative path that leads somewhere from the current folder made absolute."""

    def resolve(key: str, name: str, is_file: bool) -> str:
        given = _expanded(name)
        return str(_joined(Path.cwd(), given)) if os.path.exists(given) else name

    return _changed(values, resolve)


def from_here(values: Mapping[str, Any]) -> dict[str, Any]:
    """Tables with each absolute path made relative to the current folder, so that they do not depend on the
    machine.
    """

    def resolve(key: str, name: str, is_file: bool) -> str:
        return os.path.relpath(name) if os.path.isabs(name) else name

    result = _changed(values, resolve)
    if isinstance(tables := values.get("compare"), Mapping):
        result["compare"] = {name: _changed(table, resolve) for name, table in tables.items()}
    return result


def absolute(recipe: Recipe) -> Recipe:
    """The recipe with each relative path that leads somewhere from the current folder made absolute, so that
    it means the same from everywhere.
    """
    changed: dict[str, Any] = {}
    for section in {*NAMED, *FILES}:
        if getattr(recipe, section) is None:
            continue
        # iter: dict alone takes a setting called keys for the method of mappings.
        before = {section: dict(iter(getattr(recipe, section)))}
        after = existing(before)
        if after != before:
            changed[section] = getattr(recipe, section).model_copy(update=after[section])
    return recipe.model_copy(update=changed) if changed else recipe


def _changed(values: Mapping[str, Any], resolve: Any) -> dict[str, Any]:
    """Tables with every path put through ``resolve(key, name, is_file)``."""
    result = dict(values)
    for settings, is_file in ((NAMED, False), (FILES, True)):
        for section, keys in settings.items():
            if not isinstance(table := result.get(section), Mapping):
                continue
            table = dict(table)
            for key in keys:
                value, full = table.get(key), f"{section}.{key}"
                if isinstance(value, str) and is_template(value):
                    continue  # the chat template itself
                if isinstance(value, str) and is_file and "://" in value:
                    continue
                if isinstance(value, str) and value and not value.startswith("builtin:"):
                    table[key] = resolve(full, value, is_file)
                elif isinstance(value, list):
                    table[key] = [
                        resolve(full, v, is_file) if isinstance(v, str) and v and ":" not in v else v
                        for v in value
                    ]
            result[section] = table
    return result


def _expanded(name: str) -> Path:
    """A path with ``~`` replaced; one of an unknown user stays as it is."""
    return Path(os.path.expanduser(name))


def _joined(folder: Path, given: Path) -> Path:
    """``given`` from ``folder``; ``..`` is followed as the system does, a link at the end stays a link."""
    path = folder / given
    return path.resolve() if given.name in ("", "..") else path.parent.resolve() / path.name


def _is_path(name: str) -> bool:
    """Whether a name can be nothing but a path."""
    return name.startswith((".", "~")) or name.count("/") > 1 or Path(name).suffix in ENDINGS
