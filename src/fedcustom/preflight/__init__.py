"""What a recipe resolves to before it runs: rows, clients, examples, messages, policy and cost."""

from __future__ import annotations

from .recipe_check import check
from .report import RecipeCheck

__all__ = ["RecipeCheck", "check"]
