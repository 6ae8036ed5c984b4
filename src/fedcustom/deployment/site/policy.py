"""Policy checks of a site: of a recipe before anything is loaded, of each message before it leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...core.errors import PolicyError
from ...recipe.recipe import Recipe
from .settings import PolicySettings

MEGABYTE = 1e6

MAX_LABELS, MAX_LABEL_CHARACTERS, MAX_LABEL_WORDS = 10_000, 100, 12

TASKS_PER_ROUND = 4
"""Most tasks answered for each round: one is sent again when a job ends, and some methods need several."""


def check_recipe(policy: PolicySettings, recipe: Recipe) -> None:
    """Refuse a recipe that the site takes no part in.

    Raises:
        PolicyError: names the setting of the policy, and what it allows.
    """
    if policy.methods is not None and recipe.method.name not in policy.methods:
        raise PolicyError(
            f"policy.methods: method {recipe.method.name!r} is not allowed here; allowed: "
            f"{', '.join(policy.methods) or 'none'}"
        )
    if policy.base_models is not None:
        for model in models_of(recipe):
            if model not in policy.base_models:
                raise PolicyError(f"policy.base_models: {model!r} is not allowed here")
    if setting := recipe.method.opens_file:
        raise PolicyError(f"{setting}: a site opens no files that a recipe names")
    if recipe.model.trust_remote_code:
        raise PolicyError("model.trust_remote_code = true: a site runs no code that a recipe brings")
    if not policy.texts and (setting := recipe.method.sends_texts):
        raise PolicyError(
            f"policy.texts = false: {setting} would send vectors from which texts can be guessed"
        )
    if not policy.texts and recipe.training.fit_head_rounds:
        raise PolicyError(
            "policy.texts = false: training.fit_head_rounds would send sums and gradients from which a text "
            "of a rare label can be guessed; training.logit_adjustment = 0 turns such rounds off"
        )
    if policy.minimum_noise > 0:
        raise PolicyError(
            f"policy.minimum_noise = {policy.minimum_noise}: the recipe asks for no privacy noise, "
            "and no method adds any yet"
        )


def models_of(recipe: Recipe) -> list[str]:
    """Every pretrained model that a recipe names; the base with its revision, as in ``name@revision``, where
    the recipe asks for one.
    """
    base, revision = recipe.model.base, recipe.model.revision
    named = [f"{base}@{revision}" if revision else base, *recipe.method.named_models]
    return [name for name in named if name]


def check_labels(labels: Sequence[Any], *, named: bool) -> None:
    """Refuse to tell the values of a column as labels where they look like texts. ``named``: the site's own
    file says which column holds its labels.

    Raises:
        PolicyError: there are too many for labels, or they are too long.
    """
    most, longest = MAX_LABELS, MAX_LABEL_CHARACTERS
    if len(labels) > most or any(len(str(label)) > longest for label in labels):
        raise PolicyError(
            f"the column of labels has more than {most} values, or values of more than {longest} characters; "
            "a recipe cannot read out texts so"
        )
    if not named and any(len(str(label).split()) > MAX_LABEL_WORDS for label in labels):
        raise PolicyError("the recipe's column of labels holds texts; name another in site.toml (data.label)")


def check_round(policy: PolicySettings, rounds: int, tasks: int = 0) -> None:
    """Refuse one round too many. ``rounds`` counts the other rounds that were answered, ``tasks`` all tasks.

    Raises:
        PolicyError: the site has answered as many rounds of this run as it may, or so many tasks that rounds
            must have been asked again and again.
    """
    most = policy.max_rounds
    if most is not None and (rounds >= most or tasks >= TASKS_PER_ROUND * most):
        raise PolicyError(f"policy.max_rounds = {most}: so many have been answered")


def check_outgoing(
    policy: PolicySettings, kind: str, values: Mapping[str, Any], size: int, total: int
) -> None:
    """Refuse to send a message. ``size`` is its length in bytes, ``total`` what has left in this run before.

    Raises:
        PolicyError: names the setting of the policy.
    """
    if not policy.texts and (found := _first_text(values)) is not None:
        raise PolicyError(f"policy.texts = false: an answer to {kind!r} would hold a text ({found})")
    for key, amount in (("max_message_megabytes", size), ("max_total_megabytes", total + size)):
        most = getattr(policy, key)
        if most is not None and amount > most * MEGABYTE:
            raise PolicyError(f"policy.{key} = {most}: {amount / MEGABYTE:.3g} MB would leave")


def _first_text(values: Any, where: str = "") -> str | None:
    """Path of the first text among some values; keys do not count."""
    if isinstance(values, str):
        return where
    if isinstance(values, Mapping):
        found = (_first_text(value, f"{where}.{key}".strip(".")) for key, value in values.items())
        return next((place for place in found if place is not None), None)
    if isinstance(values, list | tuple):
        found = (_first_text(value, where) for value in values)
        return next((place for place in found if place is not None), None)
    return None
