"""Defaults that depend on the rest of a recipe and on the model's configuration."""

from __future__ import annotations

from typing import Any

from ..core.errors import RecipeError
from ..models.facts import ModelFacts
from ..models.settings import ModelSettings
from .label_skew import remedies_of
from .privacy import check_privacy
from .recipe import Recipe
from .secure_sum import check_secure_sum

SEARCHED = (0.3, 1.0, 3.0, 10.0)
"""What of a method's default learning rate ``training.learning_rate = "auto"`` tries."""


def complete(recipe: Recipe, facts: ModelFacts) -> Recipe:
    """The recipe with its unset settings filled in: the method's own learning rate, the remedies for label
    skew, and the pooling of the model. A complete recipe stays as it is.

    Raises:
        RecipeError: the recipe asks for a remedy that is not possible, or that its privacy does not go with.
    """
    remedies = remedies_of(recipe, linear_head=facts.linear_head)
    changed: dict[str, Any] = {}
    if "training" not in recipe.method.not_for:
        filled = {**remedies.training, **_rates(recipe, facts)}
        if filled:
            changed["training"] = recipe.training.model_copy(update=filled)
    if recipe.method.one_round:
        one = {"count": 1, "clients_per_round": None, "min_clients": 1, "selection": remedies.selection}
        changed["rounds"] = recipe.rounds.model_copy(update=one)
    elif remedies.selection != recipe.rounds.selection:
        changed["rounds"] = recipe.rounds.model_copy(update={"selection": remedies.selection})
    if (model := _pooled(recipe, facts)) is not None:
        changed["model"] = model
    if not changed:
        return recipe
    completed = recipe.model_copy(update=changed)
    try:  # what was filled in must not undo what is promised
        check_privacy(completed)
        check_secure_sum(completed)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    return completed


def _rates(recipe: Recipe, facts: ModelFacts) -> dict[str, Any]:
    """The learning rate where the recipe names none, and the rates that a search tries."""
    training = recipe.training
    if training.learning_rate not in (None, "auto"):
        return {}
    default = recipe.method.default_learning_rate(facts.kind)
    filled: dict[str, Any] = {"learning_rate": default}
    if training.learning_rate == "auto" and default and not recipe.method.only_fits:
        tried = [float(f"{factor * default:.3g}") for factor in SEARCHED]
        filled["search_rates"] = training.search_rates or tried
    return filled


def _pooled(recipe: Recipe, facts: ModelFacts) -> ModelSettings | None:
    """The model with the pooling that its folder says, so that all parties read the same; None where there
    is none to fill in.
    """
    classifies = recipe.data.task == "classification" and recipe.method.with_head
    if not classifies or facts.pooling is None:
        return None
    if recipe.model.pooling != "auto" and recipe.model.normalize is not None:
        return None
    return recipe.model.model_copy(update={"pooling": facts.pooling, "normalize": facts.normalize})
