"""What a trusted server releases of its clients' changes and head sums, so that no client is told apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...aggregation.private_mean import bounded_sum, private_mean
from ...core.errors import UpdateError
from ...core.tensors import Tensors
from ...privacy.client_mechanism import ClientMechanism
from ...privacy.clipping import FIRST, HEAD, OWN, Bound, Groups, bounded, clipped, groups_of, next_bound
from ...privacy.noise import NoiseKey
from ...privacy.settings import PrivacySettings
from ...privacy.strategy import CorrelatedNoise
from ..protocol import State, Values

SUMS = "sums"
"""The group of all sums that a head is fitted to."""

BOUND = "bound/"
"""Before a group's name in a state's values: its adaptive bound for the next round."""


def bounds_of(settings: PrivacySettings, factor: float, values: Values | None = None) -> dict[str, Bound]:
    """The bound of each group in a round. That of ``unit`` is 1 and of a number the number, times the
    schedule's ``factor``, by which clients' changes become shorter too; an adaptive one is the state's.
    """
    found = {}
    for group, kind in ((OWN, settings.clip), (HEAD, settings.clip_head)):
        if kind == "adaptive":
            found[group] = Bound(float((values or {}).get(BOUND + group, FIRST)))
        elif kind == "unit":
            found[group] = Bound(factor, unit=True)
        else:
            found[group] = Bound(kind * factor)
    return found


def clipped_by_client(
    change: Tensors, head: Collection[str], settings: PrivacySettings, factor: float
) -> Tensors:
    """A change as its client sends it, within the bounds that are known beforehand. The guarantee does not
    rest on this: the server clips again.
    """
    groups = groups_of(change, head)
    adaptive = {g for g, kind in ((OWN, settings.clip), (HEAD, settings.clip_head)) if kind == "adaptive"}
    bounds = {g: Bound(math.inf) if g in adaptive else b for g, b in bounds_of(settings, factor).items()}
    known = {group: names for group, names in groups.items() if group not in adaptive}
    some = {name: change[name] for names in known.values() for name in names}
    return change | clipped(some, known, bounds)


def clipped_sums(sums: Tensors, settings: PrivacySettings) -> Tensors:
    """A client's sums for the head as it sends them, within ``privacy.head_clip``."""
    return clipped(sums, {SUMS: list(sums)}, {SUMS: Bound(settings.head_clip)})


@dataclass(frozen=True)
class OwnNoise:
    """Noise that each client adds to its own change, enough for itself (``privacy.noise = "client"``). A
    party without ``keys`` makes none.
    """

    mechanism: ClientMechanism
    keys: Callable[[str], NoiseKey] | None

    def length(self, numbers: int, groups: int) -> float:
        """Of the noise in a group of so many numbers, over the bound."""
        return self.mechanism.noise_multiplier * math.sqrt(groups * numbers)

    def noised(
        self,
        change: Tensors,
        *,
        head: Collection[str],
        groups: int,
        round_number: int,
        factor: float,
        client: str,
    ) -> Tensors:
        """A change within its bounds, with noise in each number.

        Args:
            change: What the client would send.
            head: Names of the head's tensors.
            groups: In how many groups the run's tensors are bounded.
            round_number: From 1.
            factor: The schedule's, to which bound and noise are in proportion.
            client: Whose key is used.

        Raises:
            UpdateError: this party has no key.
        """
        if self.keys is None:
            raise UpdateError("privacy.noise = 'client': this party has no key to draw noise from")
        names = groups_of(change, head)
        bounds = bounds_of(self.mechanism.settings, factor)
        found = bounded(change, names, bounds).tensors
        noise = self.keys(client).normal_like(round_number, "own", change)
        return private_mean(
            found,
            noise,
            names,
            {group: bound.size for group, bound in bounds.items()},
            deviation=self.mechanism.sum_noise(groups),
            expected=1.0,
        )

    def mean(self, changes: Iterable[Mapping[str, Tensor]]) -> Tensors:
        """What clients sent, added up, over how many a round has on average. Their noise is in it: a change
        is not bounded again.
        """
        total: Tensors = {}
        for change in changes:
            for name, tensor in change.items():
                total[name] = tensor.double() if name not in total else total[name].add_(tensor)
            del change  # before the next one is made
        expected = self.mechanism.participation.expected
        return {name: (tensor / expected).to(torch.float32) for name, tensor in total.items()}


class ClientRelease:
    """The releases of one run by its server: noise by the server's ``key``, as much as the ``mechanism``
    needs. Rounds of ``head_rounds`` fit the head, all others train.
    """

    def __init__(self, mechanism: ClientMechanism, key: NoiseKey, head_rounds: Collection[int]) -> None:
        self.mechanism, self.key, self.head_rounds = mechanism, key, frozenset(head_rounds)
        self._noise: CorrelatedNoise | None = None

    def trained_before(self, round_number: int) -> int:
        """How many rounds before this one trained."""
        return round_number - 1 - sum(number < round_number for number in self.head_rounds)

    def mean(
        self,
        changes: Iterable[Mapping[str, Tensor]],
        state: State,
        *,
        travelling: Mapping[str, Tensor],
        trained: Collection[str],
        head: Collection[str],
        round_number: int,
        factor: float,
    ) -> tuple[Tensors, Values]:
        """The noised mean change of a round, and the adaptive bounds for the next one.

        Args:
            changes: Of the clients that answered; the names are ``trained``.
            state: With the bounds of this round.
            travelling: All tensors that are trained in some round.
            trained: Names of those that are trained in this round.
            head: Names of the head's tensors.
            round_number: From 1; noise of another round is independent of this one's.
            factor: The schedule's.
        """
        mechanism, settings = self.mechanism, self.mechanism.settings
        row = self.trained_before(round_number)
        every, groups = groups_of(travelling, head), groups_of(trained, head)
        kinds = {OWN: settings.clip, HEAD: settings.clip_head}
        adaptive = [group for group in every if kinds[group] == "adaptive"]
        bounds = bounds_of(settings, factor, state.values)
        found = bounded_sum(changes, {name: travelling[name] for name in trained}, groups, bounds)
        change = private_mean(
            found.tensors,
            self._row(row, travelling),
            groups,
            {group: bound.size for group, bound in bounds.items()},
            deviation=mechanism.sum_noise(len(every), len(adaptive)),
            expected=mechanism.participation.expected,
        )
        return change, self._next_bounds(found.within, groups, adaptive, bounds, row)

    def head_sums(
        self, sums: Iterable[Mapping[str, Tensor]], forms: Mapping[str, Tensor], round_number: int
    ) -> tuple[Tensors, float]:
        """The noised sum of what clients sent for the head, each cut to ``privacy.head_clip``, and the
        standard deviation of the noise in each number.
        """
        size, multiplier = self.mechanism.settings.head_clip, self.mechanism.head_noise
        if multiplier is None:
            raise RuntimeError("the mechanism has no release for a head")
        groups = {SUMS: list(forms)}
        found = bounded_sum(sums, forms, groups, {SUMS: Bound(size)}).tensors
        noise = self.key.normal_like(round_number, "head sums", forms)
        deviation = multiplier * size
        return {name: size * tensor + deviation * noise[name] for name, tensor in found.items()}, deviation

    def _row(self, number: int, travelling: Mapping[str, Tensor]) -> Tensors:
        if self._noise is None:
            forms = {name: tensor.to("meta") for name, tensor in travelling.items()}
            self._noise = CorrelatedNoise(
                self.mechanism.coefficients, lambda row: self.key.normal_like(row, "changes", forms)
            )
        return self._noise.row(number)

    def _next_bounds(
        self,
        within: Mapping[str, float],
        groups: Groups,
        adaptive: Collection[str],
        bounds: Mapping[str, Bound],
        row: int,
    ) -> Values:
        """From the noised shares of changes within their bounds: a client moves the number of which a share
        is made by a half, and one that did not answer by nothing.
        """
        found: Values = {}
        for group in adaptive:
            if group not in groups:
                continue
            noise = float(self.key.normal(row, f"within/{group}", 1)[0])
            expected = self.mechanism.participation.expected
            number = within[group] + self.mechanism.indicator_noise * noise
            found[BOUND + group] = next_bound(bounds[group].size, 0.5 + number / expected)
        return found
