"""A run whose clients hide their training rows: each client's mechanism, and what has been spent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.files import write_json
from ..data.examples import FederatedData
from ..methods.tuning.hidden_rows import STEPS, steps_of
from ..privacy.accounting import Guarantee
from ..privacy.example_mechanism import ExampleMechanism, ExamplePrivacy, check_delta
from ..privacy.example_record import example_guarantee, example_record
from ..recipe import Recipe
from .private_run import RECORD
from .schedule import plan_rounds

MOST_TOLD = 8
"""Clients of which the epsilon after each round is computed: those that have made most of their steps."""


@dataclass(frozen=True)
class ExampleRun:
    """The mechanisms of the clients that train, by name; across sites, each of which calibrates for itself,
    none is known. ``steps`` are how many each client makes in each planned round.
    """

    privacy: ExamplePrivacy
    mechanisms: dict[str, ExampleMechanism] = field(default_factory=dict)
    steps: list[dict[str, int]] = field(default_factory=list)

    def spent(self, round_number: int) -> float:
        """The largest epsilon of a client after the first rounds up to this one, as planned; 0 where none is
        known.
        """
        done: dict[str, int] = {}
        for steps in self.steps[:round_number]:
            for name, count in steps.items():
                done[name] = done.get(name, 0) + count
        first = sorted(done, key=lambda name: -self._weight(name, done[name]))
        return max((self.mechanisms[name].epsilon(done[name]) for name in first[:MOST_TOLD]), default=0.0)

    def _weight(self, name: str, steps: int) -> float:
        """What so many of a client's steps spend, roughly: by the central limit, mu^2 of subsampled noise."""
        mechanism = self.mechanisms[name]
        return steps * (mechanism.rate / mechanism.noise_multiplier) ** 2

    def guarantee(self) -> Guarantee | None:
        """The largest of the clients'; None where each site knows its own alone."""
        found = example_guarantee(self.privacy.settings, self.mechanisms)
        return found if math.isfinite(found.epsilon) else None

    def write(self, directory: Path, memories: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Put the record into the run's directory; by what clients remember, it says what they have spent."""
        done = {name: int(values.get(STEPS, 0)) for name, values in (memories or {}).items()}
        write_json(directory / RECORD, example_record(self.privacy.settings, self.mechanisms, done))


def example_run(recipe: Recipe, data: FederatedData) -> ExampleRun | None:
    """The mechanisms of a complete recipe on these clients' training rows; None where it hides no rows.

    Raises:
        RecipeError: names the key of the recipe that does not fit.
    """
    privacy = example_privacy(recipe, data)
    if privacy is None:
        return None
    sizes = {name: len(client.train) for name, client in data.clients.items()}
    mechanisms = {name: privacy.mechanism(name, sizes[name]) for name in privacy.steps}
    return ExampleRun(privacy, mechanisms, _planned(recipe.settled(len(sizes)), data))


def example_privacy(recipe: Recipe, data: FederatedData | None) -> ExamplePrivacy | None:
    """What clients hide their rows by, with the steps that each is to make; None where they do not. Clients
    whose rows are not known, those of other sites, are left out.
    """
    if (settings := recipe.example_privacy) is None:
        return None
    total: dict[str, int] = {}
    for steps in _planned(recipe.settled(len(data.clients)), data) if data is not None else []:
        for name, count in steps.items():
            total[name] = total.get(name, 0) + count
    return ExamplePrivacy(settings, recipe.training.batch_size, recipe.seed, total)


def check_rows(recipe: Recipe, data: FederatedData) -> None:
    """Refuse a delta that is too large for one of the clients, before anything is loaded.

    Raises:
        RecipeError: names the key, and the largest delta.
    """
    if (settings := recipe.example_privacy) is not None:
        check_delta(settings, max((len(client.train) for client in data.clients.values()), default=0) or 1)


def _planned(recipe: Recipe, data: FederatedData) -> list[dict[str, int]]:
    """How many steps each client makes in each round."""
    size = recipe.training.batch_size
    rows = {name: len(client.train) for name, client in data.clients.items()}
    return [
        {name: steps_of(a.amount, rows[name], size) for name, a in cohort.items() if rows[name]}
        for cohort in plan_rounds(recipe, data)
    ]
