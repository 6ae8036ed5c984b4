"""Changes of a recipe."""

from __future__ import annotations

from typing import Any


def changed(recipe: dict[str, Any], **method: Any) -> dict[str, Any]:
    """The recipe with other settings of its method."""
    return {**recipe, "method": {**recipe["method"], **method}}
