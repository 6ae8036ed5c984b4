"""What several private runs on the same clients promise together: epsilon of a grid or of a comparison."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from ..privacy.accounting import Event, Ledger
from ..privacy.client_mechanism import delta_of
from ..recipe import Recipe
from .private_run import planned
from .resolve import resolved

Mechanisms = dict[str, tuple[Event, ...]]

ROWS = ("source", "subset", "train")
"""Settings of ``[data]`` that say where a run's rows are from; others leave some out, or say what is made of
them."""

DIVIDED = (*ROWS, "development", "test", "limit")
"""Those that decide which rows a client has, with the division."""


def composed(recipes: Iterable[Recipe], clients_of: Callable[[Recipe], int]) -> Iterator[str]:
    """A sentence for each group of private runs that have their clients in common, or their rows where these
    are hidden, if there are several.

    Runs are on the same rows if they have the same data, and on the same clients if they have the same
    division too; that of a simulation depends on the seed, unless it is the data's own. Releases of runs that
    hide clients compose as those of one run do; the epsilons and deltas of runs that hide rows add, which is
    an upper bound.

    Args:
        recipes: The runs, trials included. No model is loaded for them.
        clients_of: How many clients a recipe has; asked once for each group.

    Raises:
        RecipeError: a recipe's noise cannot be worked out; names the key.
    """
    groups: dict[str, list[Recipe]] = {}
    for recipe in recipes:
        if recipe.baseline == "federated" and (recipe.client_privacy or recipe.example_privacy):
            complete = resolved(recipe)
            groups.setdefault(_division(complete), []).append(complete)
    known: Mechanisms = {}
    for group in groups.values():
        if len(group) > 1:
            yield _sentence(group, clients_of, known)


def _division(recipe: Recipe) -> str:
    """What decides whose rows a run is made on, and what of theirs it hides. A row is the same row whichever
    client has it.
    """
    if recipe.example_privacy is not None:
        return json.dumps(["rows", recipe.data.model_dump(mode="json", include=set(ROWS))], sort_keys=True)
    rows = recipe.data.model_dump(mode="json", include=set(DIVIDED))
    clients = recipe.clients
    seed = None if clients.partition == "natural" else recipe.seed
    parts = [rows, clients.model_dump(mode="json"), seed]
    return json.dumps(parts, sort_keys=True)


def _sentence(group: Sequence[Recipe], clients_of: Callable[[Recipe], int], known: Mechanisms) -> str:
    first = group[0]
    assert first.privacy is not None
    alone = sorted({recipe.privacy.epsilon for recipe in group if recipe.privacy and recipe.privacy.epsilon})
    each = " or ".join(f"{epsilon:g}" for epsilon in alone) or "its own"
    division = first.clients.partition
    if division == "dirichlet":
        division += f" {first.clients.alpha:g}"
    where = f"the same clients of {first.data.source} ({division}, seed {first.seed})"
    if first.example_privacy is not None:
        where = f"the same rows of {first.data.source}"
    elif division == "natural":
        where = f"the same clients of {first.data.source}"
    if first.client_privacy is not None:
        delta = max(delta_of(recipe.privacy) for recipe in group if recipe.privacy)
        clients = clients_of(first)  # of all, since they have data and division in common
        events = [event for recipe in group for event in _events(recipe, clients, known)]
        parts = _composable(events)
        epsilon = math.fsum(part.epsilon(delta) for part in parts)
        how = f"compose to epsilon {epsilon:.4g} at delta {len(parts) * delta:g}"
    else:
        epsilons = [recipe.privacy.epsilon for recipe in group if recipe.privacy]
        total = math.fsum(e for e in epsilons if e is not None)
        delta = math.fsum(delta_of(recipe.privacy) for recipe in group if recipe.privacy)
        unknown = " and more, where noise_multiplier is given" if None in epsilons else ""
        how = f"add up to epsilon {total:.4g}{unknown} and delta {delta:.3g} at most"
    return (
        f"privacy: {len(group)} runs on {where} {how} for whoever sees all of them; "
        f"each alone has epsilon {each}"
    )


def _composable(events: Sequence[Event]) -> list[Ledger]:
    """Ledgers that are each composed as one, whose epsilons and deltas add: sampled releases and those of
    integers have no accountant in common.
    """
    sampled = [event for event in events if event.sampling < 1]
    others = [event for event in events if event.sampling == 1]
    if sampled and any(event.variance is not None for event in others):
        return [Ledger.of(sampled), Ledger.of(others)]
    return [Ledger.of(events)]


def _events(recipe: Recipe, clients: int, known: Mechanisms) -> tuple[Event, ...]:
    """The releases of a run that hides clients. Recipes that differ in nothing else share the calculation."""
    fits = recipe.training.rounds_of_head_fits(recipe.rounds.count)
    key = repr((recipe.privacy, recipe.secure_sum, recipe.rounds, sorted(fits), clients))
    if key not in known:
        mechanism = planned(recipe, clients)
        assert mechanism is not None
        known[key] = mechanism.ledger(mechanism.participation.rounds, mechanism.head_fits).events
    return known[key]
