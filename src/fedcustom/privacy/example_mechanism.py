"""Example-level differential privacy: DP-SGD inside a client, worked out for each client by itself.

Each optimiser step draws every training row by itself with probability q, bounds the gradient of each row,
and adds Gaussian noise to their sum (Abadi et al. 2016, *Deep learning with differential privacy*, arXiv
1607.00133). What a client makes of the noised gradients, and the server of its change, is post-processing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from ..core.errors import RecipeError
from ..core.tensors import Tensors
from .accounting import Event, Guarantee, Ledger, calibrate
from .clipping import HEAD, OWN, Bound, Groups
from .noise import NoiseKey
from .settings import Clip, PrivacySettings

INCLUSION, GRADIENT = "inclusion", "gradient"
"""The names under which a key draws batches and noise."""

ASSUMPTIONS = (
    "each client's own machine is trusted: batches and noise are made there, by a key that never leaves it "
    "and that each task draws anew",
    "each text is one row of one client; what stands in several rows is hidden once for each, and epsilons "
    "of several clients that hold it add",
    "the guarantee is for each client's training rows against whoever sees what the client sends; it holds "
    "for each client by itself",
)
"""What has to hold for the guarantee."""


@dataclass(frozen=True)
class ExampleMechanism:
    """What one client with so many training ``rows`` releases in ``steps`` planned optimiser steps: in each
    the sum of the bounded gradients of the rows that were drawn, with noise of ``noise_multiplier`` times the
    root of the number of groups times the bound.
    """

    settings: PrivacySettings
    rows: int
    batch_size: int
    steps: int
    noise_multiplier: float

    @property
    def rate(self) -> float:
        """With which probability a row is drawn for a step (q)."""
        return sampling_rate(self.rows, self.batch_size)

    @property
    def expected(self) -> float:
        """Rows of a batch on average, by which sums are divided, whoever was drawn."""
        return self.rate * self.rows

    @property
    def delta(self) -> float:
        """The recipe's delta."""
        return delta_of(self.settings)

    def event(self, steps: int) -> Event:
        """What so many steps release."""
        return Event(self.noise_multiplier, steps, self.rate)

    def epsilon(self, steps: int) -> float:
        """What so many steps have spent, at the recipe's delta."""
        if self.settings.epsilon is not None and steps == self.steps:  # the calibration stops a trifle below
            return self.settings.epsilon
        return _epsilon(self.noise_multiplier, self.rate, steps, self.delta)

    def guarantee(self) -> Guarantee:
        """Of all planned steps, for this client's rows."""
        return Guarantee("example", self.epsilon(self.steps), self.delta, self.settings.is_valid, ASSUMPTIONS)


def example_mechanism(
    settings: PrivacySettings, *, rows: int, batch_size: int, steps: int
) -> ExampleMechanism:
    """The noise by which the recipe's guarantee holds for a client's rows.

    Args:
        settings: The recipe's section, with ``unit = "example"``.
        rows: The client's training rows.
        batch_size: Rows of a step on average; a client with fewer takes all of them.
        steps: The optimiser steps that it makes in all planned rounds.

    Raises:
        RecipeError: names the key that does not fit.
    """
    if rows < 1 or steps < 1:
        raise ValueError(f"{rows} rows in {steps} steps")
    check_delta(settings, rows)
    multiplier = settings.noise_multiplier
    if multiplier is None:
        assert settings.epsilon is not None
        rate = sampling_rate(rows, batch_size)
        multiplier = _calibrated(settings.epsilon, delta_of(settings), rate, steps)
    return ExampleMechanism(settings, rows, batch_size, steps, multiplier)


def check_delta(settings: PrivacySettings, rows: int) -> None:
    """Refuse a delta by which a client's mechanism might now and then publish one of its rows.

    Raises:
        RecipeError: names the key, and the largest delta for so many rows.
    """
    if (delta := delta_of(settings)) > 1 / (10 * rows):
        raise RecipeError(
            f"privacy.delta = {delta:g}: at most 1 / (10 rows) = {1 / (10 * rows):g} for a client with "
            f"{rows} training rows; a larger one would allow a row to be published now and then"
        )


def sampling_rate(rows: int, batch_size: int) -> float:
    """With which probability each of a client's rows is drawn for a step."""
    return min(1.0, batch_size / rows)


def delta_of(settings: PrivacySettings) -> float:
    """The recipe's delta, which a section with a unit has."""
    assert settings.delta is not None
    return settings.delta


@dataclass(frozen=True)
class RowPrivacy:
    """One task's randomness and bounds: the batches of its steps, counted from 0, and their noise. The same
    key must never serve two tasks: the difference of two answers with the same noise has none.
    """

    mechanism: ExampleMechanism
    key: NoiseKey

    @property
    def bounds(self) -> dict[str, Bound]:
        """Of a row's gradient, by group."""
        settings = self.mechanism.settings
        return {OWN: _bound(settings.clip), HEAD: _bound(settings.clip_head)}

    def batch(self, step: int) -> list[int]:
        """The rows of a step: each is drawn by itself, so that there may be none (Poisson sampling)."""
        mechanism = self.mechanism
        if mechanism.rate == 1:
            return list(range(mechanism.rows))
        drawn = self.key.uniform(step, INCLUSION, mechanism.rows) < mechanism.rate
        return [int(row) for row in drawn.nonzero()[0]]

    def noise(self, step: int, tensors: Mapping[str, Tensor], groups: Groups) -> Tensors:
        """Noise of a step for the sum of bounded gradients of these shapes: N(0, z^2 G C^2) for each of G
        groups, in float64.
        """
        size, bounds = self.mechanism.noise_multiplier * math.sqrt(len(groups)), self.bounds
        scales = {name: size * bounds[group].size for group, names in groups.items() for name in names}
        drawn = self.key.normal_like(step, GRADIENT, tensors)
        return {name: tensor.mul_(scales[name]) for name, tensor in drawn.items()}


@dataclass(frozen=True)
class ExamplePrivacy:
    """What the clients of a run need: the recipe's section and batch size, and how many ``steps`` each client
    makes in all planned rounds, by name. Where clients are sites, each knows its own alone.
    """

    settings: PrivacySettings
    batch_size: int
    seed: int
    steps: Mapping[str, int]

    def mechanism(self, client: str, rows: int) -> ExampleMechanism:
        """That of one client.

        Raises:
            RecipeError: the recipe plans no step of this client, or names a key that does not fit.
        """
        planned = self.steps.get(client, 0)
        if planned < 1:
            raise RecipeError(f"privacy.unit = 'example': client {client!r} trains in no planned round")
        return example_mechanism(self.settings, rows=rows, batch_size=self.batch_size, steps=planned)

    def begin(self, client: str, rows: int, round_number: int) -> RowPrivacy:
        """The randomness of one task: a fresh key of the operating system's, so that a task that is done
        again has other noise; with ``randomness = "seeded"`` one that the seed, the client and the round say.
        """
        if self.settings.is_valid:
            key = NoiseKey.fresh()
        else:
            text = f"fedcustom rows {self.seed}/{round_number}/{client}"
            key = NoiseKey(hashlib.sha256(text.encode()).digest(), secret=False)
        return RowPrivacy(self.mechanism(client, rows), key)


def _bound(clip: Clip) -> Bound:
    if clip == "unit":
        return Bound(1.0, unit=True)
    if clip == "adaptive":
        raise ValueError("an adaptive bound is for clients")
    return Bound(clip)


@lru_cache(maxsize=4096)
def _calibrated(epsilon: float, delta: float, rate: float, steps: int) -> float:
    return calibrate(lambda z: [Event(z, steps, rate)], epsilon, delta)


@lru_cache(maxsize=4096)
def _epsilon(noise_multiplier: float, rate: float, steps: int, delta: float) -> float:
    return Ledger.of([Event(noise_multiplier, steps, rate)]).epsilon(delta)
