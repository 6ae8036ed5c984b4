"""Changes with noise of their clients, as integers to be summed under masks (``privacy.noise = "sum"``)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...core.errors import UpdateError
from ...core.tensors import Tensors
from ...privacy.client_mechanism import ClientMechanism
from ...privacy.clipping import bounded, groups_of
from ...privacy.noise import NoiseKey
from ...privacy.secure_sum.fixed_point import rounding_key
from ...privacy.secure_sum.integers import Numbers
from ...privacy.skellam import skellam
from ...privacy.sum_noise import SCALE, factor_of, rounded
from ...training.local import schedule_factor
from .method import WeightTuning
from .release import bounds_of

Keys = Callable[[str], NoiseKey]
"""The key of a client's noise. Only that client has it; in a simulation, and with ``randomness = "seeded"``,
one party has all."""


@dataclass(frozen=True)
class NoisedSums:
    """How a client's change becomes integers with noise of its own, and how their sum is read. What is done
    follows from the recipe and the number of clients, and from nothing that a task says.

    Args:
        mechanism: The run's, with the terms of its secure sums.
        groups: In how many groups the run's tensors are bounded.
        head: Names of the head's tensors.
        factor: The schedule's factor of a round.
        keys: None at a server of other sites, which makes no noise.
        seed: The recipe's, by which numbers are rounded.
    """

    mechanism: ClientMechanism
    groups: int
    head: frozenset[str]
    factor: Callable[[int], float]
    keys: Keys | None
    seed: int

    @classmethod
    def of(cls, method: WeightTuning, mechanism: ClientMechanism, keys: Keys | None) -> NoisedSums:
        """Those of a method's changes."""
        context, trainable = method.context, method.trainable

        def factor(number: int) -> float:
            return schedule_factor(context.training, number, context.rounds)

        count = method.server.parts.bounded_groups
        return cls(mechanism, count, trainable.head, factor, keys, context.seed)

    def encode(
        self, change: Mapping[str, Tensor], round_number: int, client: str, needed: int
    ) -> Iterator[Numbers]:
        """The integers of each of a change's tensors, in the order of their names, noised, modulo 2^32.

        Args:
            change: The client's change, which is bounded here, whatever its length.
            round_number: Noise of another round is independent.
            client: Whose change and whose key.
            needed: How many clients have to stay in this secure sum (t), among which noise is divided.

        Raises:
            UpdateError: this party makes no noise.
        """
        if self.keys is None:
            raise UpdateError("privacy.noise = 'sum': this party has no key to draw noise from")
        names = sorted(change)
        whole = dict(zip(names, self._whole(change, round_number, client), strict=True))
        key = self.keys(client)
        variance = self.mechanism.sum_noise_of(self.groups).variance(needed)
        for name in names:
            numbers = whole.pop(name)
            numbers += skellam(key, round_number, f"sum/{name}", variance, len(numbers))
            yield numbers.astype(np.uint32)  # modulo 2^32

    def _whole(
        self, change: Mapping[str, Tensor], round_number: int, client: str
    ) -> Iterator[np.ndarray[tuple[int], np.dtype[np.int64]]]:
        """The same before noise, each group of norm :data:`SCALE` at most."""
        groups = groups_of(change, self.head)
        bounds = bounds_of(self.mechanism.settings, self.factor(round_number))
        unit = bounded(change, groups, bounds).tensors
        found = {}
        for group, names in groups.items():
            flat = torch.cat([unit[name].reshape(-1) for name in names]).numpy()
            numbers = rounded(flat, rounding_key(self.seed, round_number, client, group))
            start = 0
            for name in names:
                found[name] = numbers[start : start + change[name].numel()]
                start += change[name].numel()
        yield from (found[name] for name in sorted(found))

    def decode(self, total: Numbers, forms: Mapping[str, Tensor], round_number: int) -> Tensors:
        """The noised mean change, from the sum of the clients' integers: divided by how many a round has on
        average, whoever answered.
        """
        sizes = {
            group: bound.size
            for group, bound in bounds_of(self.mechanism.settings, self.factor(round_number)).items()
        }
        groups = groups_of(forms, self.head)
        divisors = {
            name: factor_of(sum(forms[one].numel() for one in names))
            * self.mechanism.participation.expected
            / sizes[group]
            for group, names in groups.items()
            for name in names
        }
        start, tensors = 0, Tensors()
        for name in sorted(forms):
            like = forms[name]
            count = math.prod(like.shape)
            values = total[start : start + count].view(np.int32).astype(np.float64) / divisors[name]
            tensors[name] = torch.from_numpy(values).reshape(like.shape).to(like.dtype)
            start += count
        return tensors

    def bound_to(self, task: bytes) -> bytes:
        """SHA-256 of a task's digest and of all that decides how much noise there is, from which masks are
        made: changes of sites that were told of less noise, or of noise that everybody knows, do not add up
        with those of the others.
        """
        mechanism = self.mechanism
        assert mechanism.terms is not None
        noise = {
            "multiplier": mechanism.noise_multiplier,
            "groups": self.groups,
            "norm": SCALE,
            "colluding": mechanism.terms.colluding,
            "threshold": mechanism.terms.threshold,
            "secret": mechanism.settings.is_valid,
        }
        return hashlib.sha256(json.dumps([task.hex(), noise], sort_keys=True).encode()).digest()
