"""Amounts of a task: how much a message asks for, held to the recipe and to the site's least sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...core.errors import PolicyError
from ...core.tensors import Tensors
from ...methods.retrieval.settings import RetrievalSettings
from ...recipe.recipe import Recipe
from ...training.local import schedule_factor
from .contents import QUERIES, SEARCH_TASKS, round_tasks
from .request import Request
from .settings import PolicySettings

AMOUNTS = ("steps", "epochs", "examples")

BATCHES = "batches"

MAX_TEMPLATE, MAX_LABEL_TEXT, MAX_PLACEHOLDERS = 10_000, 1_000, 10
"""Characters of a prompt's template and of a label's text in it, and how often a template may have a
placeholder: a prompt is written out as many times as long.
"""

MAX_LISTED, MAX_DESCRIBED = 100_000, 10_000_000
"""Characters of all labels in one prompt, and of the descriptions of all labels."""

MAX_CANDIDATES, MAX_TEXTS = 10_000, 100_000


def check_amounts(recipe: Recipe, request: Request, tensors: Tensors) -> None:
    """Refuse a task whose kind, round or amount of work is not the recipe's, as it was when the run began.

    ``recipe`` is settled for the number of the run's clients.

    Raises:
        PolicyError: names the amount, what the message asks for and what the recipe says.
    """
    in_round, task, values = request.round is not None, request.task, request.values
    known = round_tasks(recipe)
    searches = recipe.method.name == "retrieval" and not in_round
    allowed = frozenset(SEARCH_TASKS) if searches else known
    if allowed is not None and task not in allowed:
        where = "in a round" if in_round else "outside rounds"
        raise PolicyError(f"the recipe's method has no task {task!r} {where}")
    if not searches and not in_round:
        raise PolicyError(f"a task {task!r} belongs to a round, and the message names none")
    if in_round:
        _check_round(recipe, request)
    if task in ("train", "distil"):
        _check_training(recipe, request.round or 0, values)
    elif "examples" in values:
        raise PolicyError(f"examples = {str(values['examples'])[:40]}: the recipe says how many a task takes")
    if task == "score":
        _check_candidates(recipe, values)
    if searches and task in QUERIES and isinstance(recipe.method, RetrievalSettings):
        _check_search(recipe.method, task, values, tensors)


def check_templates(recipe: Recipe) -> None:
    """Refuse a recipe whose prompts would fill the memory when they are written out.

    Raises:
        PolicyError: names the setting.
    """
    method: Any = recipe.method
    if method.name != "prompt_engineering":
        return
    for template in (*method.instructions, method.preamble):
        _check_template("method.instructions", template)
    written = [[texts] if isinstance(texts, str) else texts for texts in method.verbalisers.values()]
    _check_texts("method.verbalisers", [text for row in written for text in row])
    _check_texts("method.synonyms", [text for row in method.synonyms.values() for text in row])


def check_evaluated(recipe: Recipe, values: Mapping[str, Any]) -> None:
    """Refuse to evaluate a state whose prompts would fill the memory when they are written out.

    Raises:
        PolicyError: names what is too long, or too many.
    """
    if recipe.method.name != "prompt_engineering":
        return
    _check_bred(values.get("bred", {}), MAX_CANDIDATES)


def queries_of(request: Request, tensors: Tensors) -> int:
    """How many queries of documents a request holds."""
    if request.round is not None or request.task not in QUERIES:
        return 0
    vectors, texts = tensors.get("queries"), request.values.get("texts", ())
    return max(1, 0 if vectors is None else len(vectors), len(texts) if isinstance(texts, list) else 0)


def trained_examples(recipe: Recipe, values: Mapping[str, Any], count: int) -> tuple[int, int, int]:
    """Of a task to train on ``count`` examples: the size of its batches, its steps, and how many different
    examples it sees.
    """
    size, batches = recipe.training.batch_size, values.get(BATCHES)
    if batches is not None:
        size = max(1, count // max(1, min(count, int(batches))))
    if recipe.training.local_steps:
        steps = recipe.training.local_steps
        return min(size, count), steps, min(count, steps * size)
    seen = max(1, round(recipe.training.local_epochs * count))
    return min(size, count), math.ceil(seen / size), min(count, seen)


def check_least_training(
    policy: PolicySettings, recipe: Recipe, values: Mapping[str, Any], count: int
) -> None:
    """Refuse to train on so little that an update would show single examples.

    Raises:
        PolicyError: names the line of the policy.
    """
    size, steps, seen = trained_examples(recipe, values, count)
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


def _check_round(recipe: Recipe, request: Request) -> None:
    number, named = request.round, request.values.get("round")
    if number is None or number > recipe.rounds.count:
        raise PolicyError(f"round {number}: the recipe has rounds.count = {recipe.rounds.count}")
    if type(named) is not int or named != number:
        raise PolicyError(f"round {number}: the task names another round")


def _check_training(recipe: Recipe, number: int, values: Mapping[str, Any]) -> None:
    training = recipe.training
    wanted = {"epochs": training.local_epochs}
    if training.local_steps:
        wanted = {"steps": training.local_steps}
    asked = {key: values[key] for key in AMOUNTS if key in values}
    if asked.keys() != wanted.keys() or any(not _equal(asked[key], wanted[key]) for key in wanted):
        said = ", ".join(f"{key} = {value}" for key, value in wanted.items())
        raise PolicyError(f"{_shown(asked)}: the recipe says {said}")
    if BATCHES in values:
        fits = training.rounds_of_head_fits(recipe.rounds.count)
        balanced = recipe.rounds.selection == "balanced" and min(fits, default=number) < number
        batches = values[BATCHES]
        if not balanced or training.local_steps or type(batches) is not int or batches < 1:
            raise PolicyError(
                f"batches = {str(batches)[:40]}: the recipe's rounds have no such number in this one"
            )
    factor, rates = schedule_factor(training, number, recipe.rounds.count), [1.0]
    if training.search_rates and isinstance(training.learning_rate, float):
        rates += [rate / training.learning_rate for rate in training.search_rates]
    asked_factor = values.get("learning_rate_factor")
    if not any(_equal(asked_factor, factor * rate) for rate in rates):
        raise PolicyError(
            f"learning_rate_factor = {str(asked_factor)[:40]}: the recipe's schedule says {factor:g}"
        )


def _check_candidates(recipe: Recipe, values: Mapping[str, Any]) -> None:
    """Refuse more prompts than the recipe scores, and prompts so long that they would fill the memory."""
    numbers, bred = values.get("candidates"), values.get("bred")
    method: Any = recipe.method
    whole_field = method.bandit == "successive_halving"
    most = MAX_CANDIDATES if whole_field else method.candidates_per_round
    if not isinstance(numbers, list) or len(numbers) > most or not all(type(n) is int for n in numbers):
        raise PolicyError(f"candidates: the recipe scores at most {most} in a round")
    if len(set(numbers)) < len(numbers):
        raise PolicyError("candidates: one is named twice")
    _check_bred(bred, most)


def _check_bred(bred: Any, most: int) -> None:
    if not isinstance(bred, dict) or len(bred) > most:
        raise PolicyError(f"bred: must be an object of at most {most} candidates")
    for row in bred.values():
        template = row.get("template") if isinstance(row, dict) else None
        labels = row.get("labels") if isinstance(row, dict) else None
        if not isinstance(template, str) or not isinstance(labels, list):
            raise PolicyError("bred: a candidate has a template and labels, all of them texts")
        _check_template("bred", template)
        _check_texts("bred", labels)
        listed = template.count("{labels}") * sum(len(label) + 2 for label in labels)
        described = len(labels) * len(template) + template.count("{label}") * sum(map(len, labels))
        if listed > MAX_LISTED or described > MAX_DESCRIBED:
            raise PolicyError("bred: a candidate is too long with all labels written out")


def _check_template(key: str, template: str) -> None:
    if len(template) > MAX_TEMPLATE:
        raise PolicyError(f"{key}: a template has more than {MAX_TEMPLATE} characters")
    if template.count("{label") > MAX_PLACEHOLDERS:  # both {label} and {labels}
        raise PolicyError(f"{key}: a template names labels more than {MAX_PLACEHOLDERS} times")


def _check_texts(key: str, texts: list[Any]) -> None:
    if len(texts) > MAX_TEXTS or not all(isinstance(text, str) for text in texts):
        raise PolicyError(f"{key}: must be at most {MAX_TEXTS} texts")
    if any(len(text) > MAX_LABEL_TEXT for text in texts):
        raise PolicyError(f"{key}: a text has more than {MAX_LABEL_TEXT} characters")


def _check_search(method: RetrievalSettings, task: str, values: Mapping[str, Any], tensors: Tensors) -> None:
    if task == "retrieve":
        if type(values.get("top")) is not int or values["top"] != method.top:
            raise PolicyError(
                f"top = {str(values.get('top'))[:40]}: the recipe says method.top = {method.top}"
            )
        texts, vectors = values.get("texts"), tensors.get("queries")
        if texts is not None and not (
            method.search != "vector" and isinstance(texts, list) and all(isinstance(t, str) for t in texts)
        ):
            raise PolicyError(f"texts: the recipe says method.search = {method.search!r}")
        if vectors is not None and (method.search == "text" or vectors.dim() != 2):
            raise PolicyError(f"queries: the recipe says method.search = {method.search!r}")
        return
    documents = values.get("documents")
    most = method.top if task == "fetch" else min(method.top, method.passages_given)
    if not isinstance(documents, list) or not 1 <= len(documents) <= most:
        raise PolicyError(f"documents: the recipe asks for at most {most} in an answer to one query")
    if len(set(map(str, documents))) < len(documents):
        raise PolicyError("documents: one is named twice")


def _equal(asked: Any, wanted: float) -> bool:
    if type(asked) not in (int, float):
        return False
    try:
        return math.isclose(asked, wanted, rel_tol=1e-9, abs_tol=1e-12)
    except OverflowError:
        return False


def _shown(asked: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {str(value)[:40]}" for key, value in asked.items()) or "no amount"
