"""The complete recipe of a run: its unset settings, once the model's configuration has been read."""

from __future__ import annotations

from ..models.configuration import read_facts
from ..recipe import Recipe
from ..recipe.defaults import complete


def resolved(recipe: Recipe) -> Recipe:
    """The recipe with every default filled in (:func:`fedcustom.recipe.defaults.complete`). Reads the model's
    configuration, not its weights.

    Raises:
        RecipeError: the recipe asks for a remedy of label skew that is not possible.
    """
    return complete(recipe, read_facts(recipe.model))
