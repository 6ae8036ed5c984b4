"""Amounts of a task: how much a message asks for, held to the recipe and to the site's least sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ...core.errors import PolicyError
from ...methods import ChecksTasks, Method, RoundTask, Task, TrainingTask, Work
from ...recipe.recipe import Recipe
from ...training.local import schedule_factor
from .settings import PolicySettings

AMOUNTS = ("steps", "epochs", "examples")


def check_amounts(recipe: Recipe, method: Method, asked: Task, round_number: int | None) -> None:
    """Refuse a task whose round or amount of work is not the recipe's, as it was when the run began.

    ``recipe`` is settled for the number of the run's clients, ``round_number`` is what the message says.

    Raises:
        PolicyError: names the amount, what the message asks for and what the recipe says.
    """
    if isinstance(asked, RoundTask):
        _check_round(recipe, asked, round_number)
    elif round_number is not None:
        raise PolicyError(f"the recipe's method has no task {asked.kind!r} in a round")
    if isinstance(asked, TrainingTask):
        _check_training(recipe, asked)
    elif (work := getattr(asked, "work", Work())).examples is not None:
        raise PolicyError(f"examples = {work.examples}: the recipe says how many a task takes")
    if isinstance(method, ChecksTasks):
        method.check_task(asked)


def trained_examples(recipe: Recipe, work: Work, count: int) -> tuple[int, int, int]:
    """Of a task to train on ``count`` examples: the size of its batches, its steps, and how many different
    examples it sees.
    """
    size = recipe.training.batch_size
    if work.batches is not None:
        size = max(1, count // max(1, min(count, work.batches)))
    if recipe.training.local_steps:
        steps = recipe.training.local_steps
        return min(size, count), steps, min(count, steps * size)
    seen = max(1, round(recipe.training.local_epochs * count))
    return min(size, count), math.ceil(seen / size), min(count, seen)


def check_least_training(policy: PolicySettings, recipe: Recipe, work: Work, count: int) -> None:
    """Refuse to train on so little that an update would show single examples.

    Raises:
        PolicyError: names the line of the policy.
    """
    size, steps, seen = trained_examples(recipe, work, count)
    for key, found, what in (
        ("least_batch_size", size, "examples a batch"),
        ("least_steps", steps, "steps a round"),
        ("least_examples", seen, "examples in an update"),
    ):
        least = getattr(policy, key)
        if found < least:
            raise PolicyError(f"policy.{key} = {least}: the task would have {found} {what}")


def check_least_examples(policy: PolicySettings, count: int, what: str) -> None:
    """Refuse an answer that is computed from too few examples.

    Raises:
        PolicyError: names the line of the policy; the number that there is stays here.
    """
    if count < policy.least_examples:
        raise PolicyError(f"policy.least_examples = {policy.least_examples}: there are fewer {what}")


def _check_round(recipe: Recipe, asked: RoundTask, number: int | None) -> None:
    if number is None:
        raise PolicyError(f"a task {asked.kind!r} belongs to a round, and the message names none")
    if number > recipe.rounds.count:
        raise PolicyError(f"round {number}: the recipe has rounds.count = {recipe.rounds.count}")
    if asked.round_number != number:
        raise PolicyError(f"round {number}: the task names another round")


def _check_training(recipe: Recipe, asked: TrainingTask) -> None:
    training, number, work = recipe.training, asked.round_number, asked.work
    wanted = {"epochs": float(training.local_epochs)}
    if training.local_steps:
        wanted = {"steps": float(training.local_steps)}
    given = {key: getattr(work, key) for key in AMOUNTS if getattr(work, key) is not None}
    if given.keys() != wanted.keys() or any(not _equal(given[key], wanted[key]) for key in wanted):
        said = ", ".join(f"{key} = {value:g}" for key, value in wanted.items())
        raise PolicyError(f"{_shown(given)}: the recipe says {said}")
    if work.batches is not None:
        fits = training.rounds_of_head_fits(recipe.rounds.count)
        balanced = recipe.rounds.selection == "balanced" and min(fits, default=number) < number
        if not balanced or training.local_steps:
            raise PolicyError(
                f"batches = {work.batches}: the recipe's rounds have no such number in this one"
            )
    factor, rates = schedule_factor(training, number, recipe.rounds.count), [1.0]
    if training.search_rates and isinstance(training.learning_rate, float):
        rates += [rate / training.learning_rate for rate in training.search_rates]
    given_factor = asked.learning_rate_factor
    if not any(_equal(given_factor, factor * rate) for rate in rates):
        raise PolicyError(f"learning_rate_factor = {given_factor:g}: the recipe's schedule says {factor:g}")


def _equal(asked: float, wanted: float) -> bool:
    return math.isclose(asked, wanted, rel_tol=1e-9, abs_tol=1e-12)


def _shown(given: Mapping[str, float]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in given.items()) or "no amount"
