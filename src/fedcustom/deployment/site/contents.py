"""Kinds of content: what the answer to each task holds, which a site's policy allows or denies by kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from ...methods.settings import MethodSettingsBase, TuningSettings
from ...methods.tuning.head_messages import FIT_HEAD, HEAD_GRADIENT, SCALE_HEAD
from ...recipe.recipe import Recipe

Content = Literal["updates", "counts", "sums", "logits", "vectors", "texts"]

CONTENTS: tuple[Content, ...] = get_args(Content)

HEAD = {FIT_HEAD: ("sums", "counts"), SCALE_HEAD: ("sums",), HEAD_GRADIENT: ("sums",)}

ROUND_TASKS: Mapping[str, Mapping[str, tuple[Content, ...]]] = {
    "tuning": {"train": ("updates", "counts"), **HEAD},  # type: ignore[dict-item]
    "distillation": {"distil": ("logits", "counts")},
    "prompt_engineering": {
        "score": ("counts",),
        "search": ("updates", "counts"),
        "answer": ("logits", "counts"),
    },
    "retrieval": {"train": ("updates", "counts"), "count": ("counts",)},
}
"""Tasks of a round, by method, and what an answer holds. All methods that train tensors are ``tuning``."""

SEARCH_TASKS: Mapping[str, tuple[Content, ...]] = {
    "index": ("counts",),
    "route": ("sums", "counts"),
    "calibrate": ("logits",),
    # Scores against unit vectors are the documents' vectors.
    "retrieve": ("vectors",),
    "fetch": ("texts",),
    "answer": ("texts",),
}
"""Tasks of retrieval outside rounds."""

QUERIES = ("retrieve", "fetch", "answer")
"""Tasks that ask for documents."""

MEANING: Mapping[Content, str] = {
    "updates": "changes of trained tensors",
    "counts": "numbers of examples, losses, and counts of an evaluation",
    "sums": "sums and gradients over vectors of texts, from which a text of a rare label can be guessed",
    "logits": "predictions for given texts, or scores of single examples",
    "vectors": "vectors of texts, or scores that reveal them, from which the texts can be guessed",
    "texts": "passages, answers, prompts, and the wording of errors",
}


def family(method: MethodSettingsBase) -> str:
    """The entry of :data:`ROUND_TASKS` for a method; its own name where there is none."""
    return "tuning" if isinstance(method, TuningSettings) else method.name


def round_tasks(recipe: Recipe) -> frozenset[str] | None:
    """The kinds of tasks that the recipe's method has in a round; None for a method that is not known here,
    which another package brought.
    """
    known = ROUND_TASKS.get(family(recipe.method))
    return None if known is None else frozenset(known)


def task_contents(recipe: Recipe, kind: str, *, in_round: bool) -> tuple[Content, ...]:
    """What the answer to a task holds. Of a method that is not known here that is anything."""
    known = ROUND_TASKS.get(family(recipe.method)) if in_round else SEARCH_TASKS
    if known is None or kind not in known:
        return CONTENTS
    if recipe.method.name == "retrieval" and kind == "train" and recipe.method.sends_texts:
        return (*known[kind], "vectors")
    if recipe.method.name == "prompt_engineering" and kind == "answer" and recipe.data.task == "generation":
        return ("texts", "logits", "counts")
    return known[kind]


def recipe_contents(recipe: Recipe) -> dict[Content, str]:
    """What a recipe cannot do without, with the setting that asks for it. Passages and answers of retrieval
    are not among it: a site that keeps them takes part in the search all the same.
    """
    method, training = recipe.method, recipe.training
    name = f"method.name = {method.name!r}"
    needed: dict[Content, str] = {"counts": name}
    if isinstance(method, TuningSettings):
        if not method.only_fits:
            needed["updates"] = name
        if training.fit_head_rounds or method.only_fits:
            needed["sums"] = name if method.only_fits else "training.fit_head_rounds"
    elif method.name == "retrieval":
        needed["vectors"] = method.sends_texts or name
        if getattr(method, "train", "none") != "none":
            needed["updates"] = "method.train"
        if getattr(method, "routing", "none") == "learned":
            needed |= {"sums": "method.routing", "logits": "method.routing"}
    elif method.name == "distillation":
        needed["logits"] = name
    elif method.name == "prompt_engineering":
        strategy = getattr(method, "strategy", "selection")
        if strategy == "black_box":
            needed["updates"] = "method.strategy"
        if strategy == "in_context":
            needed["logits"] = "method.strategy"
            if recipe.data.task == "generation":
                needed["texts"] = "method.strategy"
    else:
        needed |= dict.fromkeys(CONTENTS, name)
    return needed
