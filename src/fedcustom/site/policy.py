"""A site's policy, applied: to the recipe before anything is loaded, and to each message before it leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import PolicyError
from ..recipe import Recipe
from .settings import PolicySettings

MEGABYTE = 1e6


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
    if policy.base_models is not None and recipe.model.base not in policy.base_models:
        raise PolicyError(f"policy.base_models: {recipe.model.base!r} is not allowed here")
    if recipe.model.trust_remote_code:
        raise PolicyError("model.trust_remote_code = true: a site runs no code that a recipe brings")
    if policy.minimum_noise > 0:
        raise PolicyError(
            f"policy.minimum_noise = {policy.minimum_noise}: the recipe asks for no privacy noise, "
            "and no method adds any yet"
        )


def check_round(policy: PolicySettings, answered: int) -> None:
    """Refuse one round too many.

    Raises:
        PolicyError: the site has answered as many rounds of this run as it may.
    """
    if policy.max_rounds is not None and answered >= policy.max_rounds:
        raise PolicyError(f"policy.max_rounds = {policy.max_rounds}: so many have been answered")


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
    """Where in some values the first text stands, keys not counted."""
    if isinstance(values, str):
        return where
    if isinstance(values, Mapping):
        found = (_first_text(value, f"{where}.{key}".strip(".")) for key, value in values.items())
        return next((place for place in found if place is not None), None)
    if isinstance(values, list | tuple):
        found = (_first_text(value, where) for value in values)
        return next((place for place in found if place is not None), None)
    return None
