"""A run whose clients hide their training rows: each client's mechanism, and what has been spent."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import RecipeError
from ..core.files import write_json
from ..data.examples import FederatedData
from ..methods.messages import Work
from ..methods.tuning.hidden_rows import done_of, steps_of
from ..privacy.accounting import Guarantee
from ..privacy.example_mechanism import ExampleMechanism, ExamplePrivacy, Releases, check_delta
from ..privacy.example_record import example_guarantee, example_record
from ..recipe import Recipe
from .private_run import RECORD
from .schedule import plan_rounds

MOST_TOLD = 8
"""Clients of which the epsilon after each round is computed: those that have made most of their steps."""


@dataclass(frozen=True)
class ExampleRun:
    """The mechanisms of the clients that train, by name; across sites, each of which calibrates for itself,
    none is known. ``planned`` is what each client releases in each round.
    """

    privacy: ExamplePrivacy
    mechanisms: dict[str, ExampleMechanism] = field(default_factory=dict)
    planned: list[dict[str, Releases]] = field(default_factory=list)

    def spent(self, round_number: int) -> float:
        """The largest epsilon of a client after the first rounds up to this one, as planned; 0 where none is
        known.
        """
        done = _total(self.planned[:round_number])
        first = sorted(done, key=lambda name: -self._weight(name, done[name]))
        return max((self.mechanisms[name].epsilon(done[name]) for name in first[:MOST_TOLD]), default=0.0)

    def _weight(self, name: str, done: Releases) -> float:
        """What a client's releases spend, roughly: by the central limit, mu^2 of subsampled noise."""
        events = self.mechanisms[name].events(done)
        return sum(event.count * (event.sampling / event.noise_multiplier) ** 2 for event in events)

    def guarantee(self) -> Guarantee | None:
        """The largest of the clients'; None where each site knows its own alone."""
        found = example_guarantee(self.privacy.settings, self.mechanisms)
        return found if math.isfinite(found.epsilon) else None

    def write(self, directory: Path, memories: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Put the record into the run's directory; by what clients remember, it says what they have spent."""
        done = {name: done_of(dict(values)) for name, values in (memories or {}).items()}
        write_json(directory / RECORD, example_record(self.privacy.settings, self.mechanisms, done))


def example_run(recipe: Recipe, data: FederatedData) -> ExampleRun | None:
    """The mechanisms of a complete recipe on these clients' training rows; None where it hides no rows.

    Raises:
        RecipeError: names the key of the recipe that does not fit.
    """
    check_rows(recipe, data)
    privacy = example_privacy(recipe, data)
    if privacy is None:
        return None
    sizes = {name: len(client.train) for name, client in data.clients.items()}
    mechanisms = {name: privacy.mechanism(name, sizes[name]) for name in privacy.planned}
    return ExampleRun(privacy, mechanisms, _planned(recipe.settled(len(sizes)), data))


def example_privacy(recipe: Recipe, data: FederatedData | None) -> ExamplePrivacy | None:
    """What clients hide their rows by, with what each is to release; None where they do not. Clients whose
    rows are not known, those of other sites, are left out.
    """
    if (settings := recipe.example_privacy) is None:
        return None
    planned = _planned(recipe.settled(len(data.clients)), data) if data is not None else []
    return ExamplePrivacy(settings, recipe.training.batch_size, recipe.seed, _total(planned))


def check_rows(recipe: Recipe, data: FederatedData) -> None:
    """Refuse a delta that is too large for one of the clients, and a head that does not go with vectors of
    length 1, before anything is loaded.

    Raises:
        RecipeError: names the key, and what is allowed.
    """
    if (settings := recipe.example_privacy) is None:
        return
    check_delta(settings, max((len(client.train) for client in data.clients.values()), default=0) or 1)
    if (rounds := recipe.training.fit_head_rounds) and not recipe.model.normalize:
        raise RecipeError(
            f"training.fit_head_rounds = {rounds}: with privacy.unit = 'example' the head is fitted to "
            "vectors of length 1; set model.normalize = true, or fit_head_rounds = []"
        )


def _planned(recipe: Recipe, data: FederatedData) -> list[dict[str, Releases]]:
    """What each client that has rows releases in each round."""
    size, fits = recipe.training.batch_size, recipe.training.rounds_of_head_fits(recipe.rounds.count)
    rows = {name: len(client.train) for name, client in data.clients.items()}

    def of(name: str, number: int, work: Work) -> Releases:
        return Releases(head_fits=1) if number in fits else Releases(steps_of(work, rows[name], size))

    return [
        {name: of(name, number, a.amount) for name, a in cohort.items() if rows[name]}
        for number, cohort in enumerate(plan_rounds(recipe, data), start=1)
    ]


def _total(rounds: Iterable[Mapping[str, Releases]]) -> dict[str, Releases]:
    """What each client releases in these rounds together."""
    total: dict[str, Releases] = {}
    for releases in rounds:
        for name, own in releases.items():
            total[name] = total.get(name, Releases()) + own
    return total
