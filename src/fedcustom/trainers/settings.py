"""Settings of a federation of a user's Trainer, as sections of a recipe that the loop reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ..core.errors import RunError
from ..methods.settings import MethodSettingsBase
from ..recipe.recipe import Recipe, parse_recipe

SCORE = "loss"
"""By what the best round is chosen: ``eval_loss`` of the Trainer's ``evaluate()``."""


class TrainerSettings(MethodSettingsBase):
    """The method of such a run. It has no settings: the Trainer has them. Recipes cannot name it."""

    name: Literal["trainer"] = "trainer"


def loop_settings(
    arguments: Any,
    model: str,
    *,
    rounds: int,
    clients: int,
    clients_per_round: int | None,
    weighting: str,
    seed: int,
    aggregation: str | Mapping[str, Any],
    select: str,
) -> Recipe:
    """The recipe that the loop reads: rounds, aggregation and seed, with the learning rate and the amount of
    work as the Trainer's ``arguments`` say them. Its sections on data and model only have names.

    Args:
        arguments: ``transformers.TrainingArguments``.
        model: The name of the model, for the record.
        clients: How many there are.
        aggregation: The name of a rule, or settings of the section ``[aggregation]``.

    Raises:
        RecipeError: a setting is impossible; the message names it.
        RunError: a setting has no meaning here, or more clients are asked for than there are.
    """
    merging = {"rule": aggregation} if isinstance(aggregation, str) else dict(aggregation)
    merging = {"weighting": weighting, **merging}
    steps, epochs = arguments.max_steps, float(arguments.num_train_epochs)
    work = {"local_steps": steps} if steps > 0 else {"local_epochs": epochs}
    drawn = {} if clients_per_round is None else {"clients_per_round": clients_per_round}
    values = {
        "seed": seed,
        "model": {"base": model},
        "data": {"task": "generation", "source": "clients of a Trainer"},
        "clients": {"partition": "natural", "column": "client"},
        "training": {
            "learning_rate": float(arguments.learning_rate),
            "batch_size": int(arguments.per_device_train_batch_size),
            **work,
        },
        "aggregation": merging,
        "rounds": {"count": rounds, **drawn},
        "evaluation": {"metric": SCORE, "select": select},
    }
    recipe = parse_recipe(values, "federate")
    if recipe.aggregation.rule == "fltrust":
        raise RunError("federate: aggregation.rule = 'fltrust': the server has no examples of its own here")
    if recipe.aggregation.correction != "none":
        raise RunError(
            f"federate: aggregation.correction = {recipe.aggregation.correction!r}: changes the steps of "
            "local training, which are the Trainer's own; use 'none'"
        )
    if clients_per_round is not None and clients_per_round > clients:
        raise RunError(f"federate: clients_per_round = {clients_per_round}: there are {clients} clients")
    return recipe.model_copy(update={"method": TrainerSettings()})
