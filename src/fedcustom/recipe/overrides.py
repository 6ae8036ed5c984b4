"""Changes of a recipe's content: texts of ``--set``, and tables laid over tables."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any

from ..core.errors import RecipeError

UNSET: Any = object()
"""The value of a setting that is to be taken back."""


def split(text: str) -> tuple[str, Any]:
    """Key and value of ``key=value``, the value as in TOML, where quotes around a text may be left out.

    Raises:
        RecipeError: it has another form.
    """
    key, sign, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not sign or not key:
        raise RecipeError(f"--set {text!r}: write key=value, as in training.learning_rate=0.01")
    if value == "unset":
        return key, UNSET
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value


def nested(key: str, value: Any) -> dict[str, Any]:
    """The tables in which the value of ``section.key`` stands."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``change`` laid over it, table by table. Another method's name clears the old one's
    settings. A value of :data:`UNSET` takes a setting out.
    """
    result = dict(base)
    for key, value in change.items():
        old = result.get(key, {})
        if value is UNSET:
            result.pop(key, None)
        elif isinstance(value, Mapping):
            old = old if isinstance(old, Mapping) else {}
            if key == "method" and value.get("name", old.get("name")) != old.get("name"):
                old = {}
            result[key] = merged(old, value)
        else:
            result[key] = value
    return result
