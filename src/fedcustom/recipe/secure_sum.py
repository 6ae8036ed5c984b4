"""What secure sums do not go with."""

from __future__ import annotations

from ..core.errors import RecipeError, SecureSumError
from ..privacy.secure_sum.terms import LEAST_SITES, MOST_SITES
from .sections import Sections

ONLY_SUM = "the server sees the sum of all changes alone"


def check_secure_sum(recipe: Sections) -> None:
    """Refuse what needs each client's own change, or that cannot be added up.

    Raises:
        ValueError: names the setting, and says why.
    """
    settings = recipe.secure_sum
    if settings is None or not settings.on:
        return
    aggregation, training = recipe.aggregation, recipe.training
    said: list[tuple[object, str, str]] = [
        (
            aggregation.needs_individual_updates,
            f"aggregation.rule = {aggregation.rule!r}",
            f"looks at each client's change, and {ONLY_SUM}; use 'mean'",
        ),
        *(
            (
                getattr(aggregation, key) is not None,
                f"aggregation.{key} = {getattr(aggregation, key)}",
                f"is a check of each client's change, and {ONLY_SUM}; leave it unset",
            )
            for key in ("max_norm", "max_norm_ratio")
        ),
        (
            recipe.rounds.selection == "balanced",
            "rounds.selection = 'balanced'",
            "is drawn by each client's labels, which are not told; use 'uniform'",
        ),
        (
            recipe.compression.kind != "none",
            f"compression.kind = {recipe.compression.kind!r}",
            "codes of changes cannot be added up; use 'none'",
        ),
        (
            recipe.participation.buffer is not None,
            f"participation.buffer = {recipe.participation.buffer}",
            "takes each client's change when it comes; leave it unset",
        ),
        (
            recipe.method.needs_single_updates,
            str(recipe.method.needs_single_updates),
            f"does not send changes that are merged by their mean, and {ONLY_SUM}",
        ),
        (
            training.search_rates or training.learning_rate == "auto",
            f"training.search_rates = {training.search_rates}"
            if training.search_rates
            else "training.learning_rate = 'auto'",
            "repeats rounds, and a client unmasks a round once; name a learning rate",
        ),
        (
            aggregation.weighting == "examples"
            and settings.most_examples is None
            and not recipe.method.only_fits,
            "secure_sum.most_examples",
            "is needed to weigh by examples: name those of the largest client, or set "
            "aggregation.weighting = 'uniform'",
        ),
    ]
    for applies, setting, reason in said:
        if applies:
            where = "" if setting.startswith("secure_sum") else " (secure_sum.on = true)"
            raise ValueError(f"{setting}: {reason}{where}")


def check_number(recipe: Sections, clients: int) -> None:
    """Refuse secure sums of too few clients a round, or too many.

    Raises:
        RecipeError: says how many there are, and how many are possible.
    """
    settings = recipe.secure_sum
    if settings is None or not settings.on:
        return
    last, asked = recipe.rounds.count, list[tuple[int, str, str]]()
    fits = recipe.training.rounds_of_head_fits(last)
    if len(fits) < last:
        count = recipe.rounds.cohort(clients)
        asked.append((count, "take part in a round", "rounds.clients_per_round"))
    if fits:
        count = recipe.training.clients_of_head_fits(clients)
        asked.append((count, "fit the head", "training.fit_head_clients"))
    for count, what, setting in asked:
        if not LEAST_SITES <= count <= MOST_SITES:
            raise RecipeError(
                f"secure_sum.on = true: {count} clients {what}; {LEAST_SITES} to {MOST_SITES} are possible "
                f"({setting})"
            )
        try:
            settings.terms().needed(count)
        except SecureSumError as error:
            raise RecipeError(str(error)) from None
