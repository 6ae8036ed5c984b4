"""Prompt engineering: the strategy that a recipe names."""

from __future__ import annotations

from collections.abc import Callable

from ..protocol import Method
from ..tuning.technique import Context
from .black_box import BlackBox
from .in_context import InContext
from .local_baseline import Alone
from .selection import Selection
from .settings import PromptEngineeringSettings

STRATEGIES: dict[str, Callable[[PromptEngineeringSettings, Context], Method]] = {
    "selection": Selection,
    "in_context": InContext,
    "black_box": BlackBox,
}


def prompt_engineering(settings: PromptEngineeringSettings, context: Context) -> Method:
    """The method of a recipe. Its local baseline is the same at each client alone.

    Raises:
        ModelError: the strategy does not fit the base model.
        RecipeError: a template or a label's text cannot be used.
    """
    strategy = STRATEGIES[settings.strategy](settings, context)
    return Alone(strategy) if context.keeps == "everything" else strategy
