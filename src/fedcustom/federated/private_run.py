"""A run whose clients are hidden by differential privacy: its mechanism, its key, and what it has spent."""

from __future__ import annotations

import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.errors import RecipeError, RunError
from ..core.files import read_json, write_json, write_secret
from ..data.build import build_data, with_builtin_columns
from ..methods.tuning.release import ClientRelease, OwnNoise
from ..privacy.client_mechanism import ClientMechanism, client_mechanism
from ..privacy.noise import BYTES, NoiseKey
from ..privacy.record import client_record
from ..recipe import Recipe
from ..recipe.privacy import FEWEST_DRAWN
from ..training.local import schedule_factor
from .run_directory import Checkpoints

KEY = "privacy.key"
"""The file of the noise's key, as long as the run lasts; only its owner can read it."""

RECORD = "privacy.json"
"""The file of the guarantee."""


@dataclass(frozen=True)
class PrivateRun:
    """The mechanism of a run and the key of its noise; None where other parties' sites make it."""

    recipe: Recipe
    mechanism: ClientMechanism
    key: NoiseKey | None

    @property
    def release(self) -> ClientRelease | None:
        """What the method's server releases by; None where clients add the noise."""
        if self.mechanism.by_clients:
            return None
        assert self.key is not None
        fits = self.recipe.training.rounds_of_head_fits(self.recipe.rounds.count)
        return ClientRelease(self.mechanism, self.key, fits)

    @property
    def own_noise(self) -> OwnNoise | None:
        """How clients noise their changes, each for itself; None where they do not. A simulation has all of
        their keys.
        """
        if self.mechanism.settings.place != "client":
            return None
        return OwnNoise(self.mechanism, None if self.key is None else self.client_key)

    def client_key(self, client: str) -> NoiseKey:
        """The key of a client's own noise, in a simulation.

        Raises:
            RuntimeError: this party has none.
        """
        if self.key is None:
            raise RuntimeError("the keys of the clients' noise are theirs")
        return self.key.of(client)

    def to_values(self) -> dict[str, Any] | None:
        """What another process of a simulation needs to make clients' own noise, as JSON holds it, with the
        key; None where clients make none.
        """
        if self.own_noise is None or self.key is None:
            return None
        key = {"key": self.key.key.hex(), "secret": self.key.secret}
        return {"record": client_record(self.mechanism), **key}

    @classmethod
    def restored(cls, recipe: Recipe, values: dict[str, Any] | None, clients: int) -> PrivateRun | None:
        """The inverse of :meth:`to_values`, of the complete recipe with so many clients."""
        settled = recipe.settled(clients)
        mechanism = planned(settled, clients) if values is not None else None
        if values is None or mechanism is None:
            return None
        key = NoiseKey(bytes.fromhex(values["key"]), values["secret"])
        return cls(settled, _as_recorded(mechanism, values["record"]), key)

    def turns(self) -> list[list[int]]:
        """The places of the clients of each round that trains."""
        return self.mechanism.participation.cohorts(self.recipe.seed, self.key)

    def spent(self, round_number: int) -> float:
        """The epsilon of the first rounds up to this one."""
        fits = self.recipe.training.rounds_of_head_fits(self.recipe.rounds.count)
        fitted = sum(number <= round_number for number in fits)
        return self.mechanism.epsilon(round_number - fitted, fitted)

    def write(self, directory: Path) -> None:
        """Put the record, and the key where there is a secret one, into the run's directory."""
        if self.key is not None and self.key.secret and not (directory / KEY).exists():
            write_secret(directory / KEY, self.key.key)
        write_json(directory / RECORD, client_record(self.mechanism))


def planned(recipe: Recipe, clients: int) -> ClientMechanism | None:
    """The mechanism of a complete recipe with so many clients; None where it hides no clients. Reads nothing.

    Raises:
        RecipeError: names the key of the recipe that does not fit.
    """
    if (settings := recipe.client_privacy) is None:
        return None
    last, fits = recipe.rounds.count, recipe.training.rounds_of_head_fits(recipe.rounds.count)
    asked = recipe.rounds.cohort(clients)
    if settings.participation == "poisson" and asked < FEWEST_DRAWN:
        raise RecipeError(
            f"rounds.clients_per_round = {asked}: with privacy.participation = 'poisson' a round may be "
            f"empty; use {FEWEST_DRAWN} at least, or 'cyclic'"
        )
    if fits and not recipe.model.normalize:
        raise RecipeError(
            f"training.fit_head_rounds = {recipe.training.fit_head_rounds}: with privacy.unit = 'client' the "
            "head is fitted to vectors of length 1; set model.normalize = true, or fit_head_rounds = []"
        )
    if len(fits) == last:
        raise RecipeError("rounds.count: no round trains; privacy.unit = 'client' needs one that does")
    factors = [schedule_factor(recipe.training, n, last) for n in range(1, last + 1) if n not in fits]
    aggregation = recipe.aggregation
    return client_mechanism(
        settings,
        clients=clients,
        clients_per_round=asked,
        factors=factors,
        momentum=0.0 if aggregation.server_optimizer == "fedavg" else aggregation.momentum,
        head_fits=len(fits),
        terms=recipe.secure_sum.terms() if settings.place == "sum" and recipe.secure_sum else None,
    )


def count_clients(recipe: Recipe) -> int:
    """How many clients a recipe has; of natural ones the data are read.

    Raises:
        RecipeError, DataError: the data cannot be read.
    """
    if recipe.clients.partition != "natural":
        return recipe.clients.count
    settings, clients = with_builtin_columns(recipe.data, recipe.clients)
    return len(build_data(settings, clients, recipe.seed, recipe.public).clients)


def private_run(
    recipe: Recipe, clients: int, directory: Path, *, with_sites: bool = False
) -> PrivateRun | None:
    """The private run of a complete recipe, begun or resumed in a directory; None where it hides no clients.
    Nothing is written yet (:meth:`PrivateRun.write`). ``with_sites``: clients are sites of other parties,
    with keys of their own.

    Raises:
        RecipeError: see :func:`planned`.
        RunError: the run was begun, and its key is gone, or can be read by others.
    """
    mechanism = planned(recipe, clients)
    if mechanism is None:
        return None
    if (directory / RECORD).exists():  # an optimiser may find other digits elsewhere
        mechanism = _as_recorded(mechanism, read_json(directory / RECORD))
    own_keys = with_sites and mechanism.by_clients
    return PrivateRun(recipe, mechanism, None if own_keys else _key(recipe, directory))


def forget_key(directory: Path) -> None:
    """Delete the key of the noise, without which nobody can take the noise away again."""
    (directory / KEY).unlink(missing_ok=True)


def _key(recipe: Recipe, directory: Path) -> NoiseKey:
    assert recipe.privacy is not None
    if not recipe.privacy.is_valid:
        return NoiseKey.seeded(recipe.seed)
    file, done = directory / KEY, Checkpoints(directory / "checkpoints").rounds()
    if not file.exists():
        if done and done[-1] < recipe.rounds.count:
            raise RunError(
                f"{file}: the key of the noise is gone, without which the rounds that are left would not fit "
                "those before; begin anew with another --out"
            )
        return NoiseKey.fresh()
    if stat.S_IMODE(file.stat().st_mode) & 0o077:
        raise RunError(
            f"{file}: others than its owner may have read it (mode "
            f"{stat.S_IMODE(file.stat().st_mode):o}, not 600), so that nothing could be promised; begin anew "
            "with another --out"
        )
    content = file.read_bytes()
    if len(content) != BYTES:
        raise RunError(f"{file}: is damaged ({len(content)} bytes, not {BYTES}); begin anew")
    return NoiseKey(content)


def _as_recorded(mechanism: ClientMechanism, record: dict[str, Any]) -> ClientMechanism:
    """The mechanism with the noise that the run began with.

    Raises:
        RunError: the record is another mechanism's.
    """
    coefficients = tuple(map(float, record["coefficients"]))
    if len(coefficients) != len(mechanism.coefficients):
        raise RunError(f"{RECORD}: {len(coefficients)} bands, not {len(mechanism.coefficients)}: damaged")
    began, now = record["participation"]["clients"], mechanism.participation.clients
    if mechanism.by_clients and began != now:  # each works out its own noise, by how many there are
        raise RunError(
            f"{RECORD}: the run began with {began} clients, who add the noise, and there are {now}; "
            "begin anew with another --out"
        )
    return replace(
        mechanism,
        coefficients=coefficients,
        noise_multiplier=float(record["noise_multiplier"]),
        head_noise=record["head"]["noise_multiplier"],
    )
