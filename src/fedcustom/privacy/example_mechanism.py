"""Example-level differential privacy: DP-SGD inside a client, worked out for each client by itself.

Each optimiser step draws every training row by itself with probability q, bounds the gradient of each row,
and adds Gaussian noise to their sum (Abadi et al. 2016, *Deep learning with differential privacy*, arXiv
1607.00133). Before training a client may send noised counts and sums of its vectors by label, of which a
head is fitted. What a client makes of noised gradients, and the server of all that it gets, is
post-processing.
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
from .accounting import Event, Guarantee, Ledger, calibrate, gaussian_mu
from .clipping import HEAD, OWN, Bound, Groups
from .noise import NoiseKey
from .settings import Clip, PrivacySettings

INCLUSION, GRADIENT, HEAD_SUMS = "inclusion", "gradient", "head sums"
"""The names under which a key draws batches and noise."""

ROW_NORM = math.sqrt(2)
"""By how much a row moves counts and sums by label: by 1 in the count of its label, and by a vector of length
1 at most in the sum."""

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
class Releases:
    """So many noised optimiser ``steps``, and so many times noised sums for a head."""

    steps: int = 0
    head_fits: int = 0

    def __add__(self, other: Releases) -> Releases:
        return Releases(self.steps + other.steps, self.head_fits + other.head_fits)

    def __bool__(self) -> bool:
        return bool(self.steps or self.head_fits)


@dataclass(frozen=True)
class ExampleMechanism:
    """What one client with so many training ``rows`` releases by what is ``planned``: in each optimiser step
    the sum of the bounded gradients of the rows that were drawn, with noise of ``noise_multiplier`` times the
    root of the number of groups times the bound; in each fit of the head counts and sums by label, with noise
    of ``head_noise`` times :data:`ROW_NORM` in each number.
    """

    settings: PrivacySettings
    rows: int
    batch_size: int
    planned: Releases
    noise_multiplier: float
    head_noise: float | None = None

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

    def events(self, done: Releases) -> list[Event]:
        """What was released by what is ``done``, of each kind that there is."""
        found = [Event(self.noise_multiplier, done.steps, self.rate)] if done.steps else []
        if done.head_fits:
            if self.head_noise is None:
                raise ValueError("the mechanism has no release for a head")
            found.append(Event(self.head_noise, done.head_fits))
        return found

    def epsilon(self, done: Releases) -> float:
        """What this has spent, at the recipe's delta."""
        if self.settings.epsilon is not None and done == self.planned and done.steps:
            return self.settings.epsilon  # the calibration stops a trifle below
        return _epsilon(tuple(self.events(done)), self.delta)

    @property
    def planned_epsilon(self) -> float:
        """What all that is planned spends."""
        return self.epsilon(self.planned)

    def guarantee(self) -> Guarantee:
        """Of all that is planned, for this client's rows."""
        return Guarantee("example", self.planned_epsilon, self.delta, self.settings.is_valid, ASSUMPTIONS)


def example_mechanism(
    settings: PrivacySettings, *, rows: int, batch_size: int, planned: Releases
) -> ExampleMechanism:
    """The noise by which the recipe's guarantee holds for a client's rows.

    Fits of the head take ``head_share`` of the mu^2 of the whole (epsilon, delta), whatever the client's rows
    and steps; the steps are calibrated to what is left. Where the recipe gives the ``noise_multiplier`` of
    the steps, the head's noise is such that it has the same share.

    Args:
        settings: The recipe's section, with ``unit = "example"``.
        rows: The client's training rows.
        batch_size: Rows of a step on average; a client with fewer takes all of them.
        planned: What it releases in all planned rounds.

    Raises:
        RecipeError: names the key that does not fit.
    """
    if rows < 1 or not planned:
        raise ValueError(f"{rows} rows, {planned}")
    check_delta(settings, rows)
    rate, delta, fits = sampling_rate(rows, batch_size), delta_of(settings), planned.head_fits
    steps = max(1, planned.steps)  # a client that only helps to fit the head has noise as if for one step
    multiplier, share = settings.noise_multiplier, settings.head_share
    head_noise: float | None = None
    if multiplier is not None:
        if fits:
            mu = gaussian_mu(_epsilon((Event(multiplier, steps, rate),), delta), delta)
            head_noise = math.sqrt(fits * (1 - share) / share) / mu
    else:
        assert settings.epsilon is not None
        if fits:
            head_noise = math.sqrt(fits / share) / gaussian_mu(settings.epsilon, delta)
        head = () if head_noise is None else (Event(head_noise, fits),)
        multiplier = _calibrated(settings.epsilon, delta, rate, steps, head)
    return ExampleMechanism(settings, rows, batch_size, planned, multiplier, head_noise)


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
    """One task's randomness and bounds: the batches of its steps, counted from 0, and their noise, or that of
    its sums. The same key must never serve two tasks: the difference of two answers with the same noise has
    none.
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

    def noised_sums(self, sums: Mapping[str, Tensor]) -> tuple[Tensors, float]:
        """Counts and sums by label with noise, in float32, and the standard deviation of the noise in each of
        their numbers. A row may move all of them together by :data:`ROW_NORM`.
        """
        if self.mechanism.head_noise is None:
            raise ValueError("the mechanism has no release for a head")
        deviation = self.mechanism.head_noise * ROW_NORM
        drawn = self.key.normal_like(0, HEAD_SUMS, sums)
        found = {name: (tensor.double() + deviation * drawn[name]).float() for name, tensor in sums.items()}
        return found, deviation


@dataclass(frozen=True)
class ExamplePrivacy:
    """What the clients of a run need: the recipe's section and batch size, and what each client releases in
    all ``planned`` rounds, by name. Where clients are sites, each knows its own alone.
    """

    settings: PrivacySettings
    batch_size: int
    seed: int
    planned: Mapping[str, Releases]

    def mechanism(self, client: str, rows: int) -> ExampleMechanism:
        """That of one client.

        Raises:
            RecipeError: the recipe plans nothing of this client, or names a key that does not fit.
        """
        planned = self.planned.get(client, Releases())
        if not planned:
            raise RecipeError(f"privacy.unit = 'example': client {client!r} trains in no planned round")
        return example_mechanism(self.settings, rows=rows, batch_size=self.batch_size, planned=planned)

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
def _calibrated(epsilon: float, delta: float, rate: float, steps: int, others: tuple[Event, ...]) -> float:
    return calibrate(lambda z: [Event(z, steps, rate), *others], epsilon, delta)


@lru_cache(maxsize=4096)
def _epsilon(events: tuple[Event, ...], delta: float) -> float:
    return Ledger.of(events).epsilon(delta)
