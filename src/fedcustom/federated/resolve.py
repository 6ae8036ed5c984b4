"""The complete recipe of a run: its unset settings, once the model's configuration has been read."""

from __future__ import annotations

from pathlib import Path

from ..core.errors import RecipeError
from ..data.settings import is_template
from ..models.configuration import read_facts
from ..recipe import Recipe
from ..recipe.defaults import complete


def resolved(recipe: Recipe) -> Recipe:
    """The recipe with every default filled in (:func:`fedcustom.recipe.defaults.complete`). Reads the model's
    configuration, not its weights, and the file of a chat template, whose text takes the place of its path.

    Raises:
        RecipeError: the recipe asks for a remedy of label skew that is not possible, or for a chat template
            that cannot be read.
    """
    return complete(_with_template(recipe), read_facts(recipe.model))


def _with_template(recipe: Recipe) -> Recipe:
    given = recipe.data.chat_template
    if given is None or is_template(given):
        return recipe
    try:
        text = Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text in UTF-8"
        raise RecipeError(f"data.chat_template = {given!r}: {reason}") from None
    if not is_template(text):
        raise RecipeError(f"data.chat_template = {given!r}: holds no Jinja template (no {{{{ or {{%)")
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"chat_template": text})})
