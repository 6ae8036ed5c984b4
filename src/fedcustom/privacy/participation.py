"""Participation: which clients work in which round, in ways that can be accounted for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .noise import NoiseKey

STREAM = 17
"""Sets the generator of the groups apart from others of the recipe's seed."""

INCLUSION = "participation"
"""The name under which the server's key draws who takes part."""


@dataclass(frozen=True)
class Participation:
    """Clients split once into ``groups``; training round t asks group t mod ``groups``, each member with
    ``probability``. Who answers, and what, has no influence on it.

    Everybody in each round is one group with probability 1, Poisson sampling one group with less.
    """

    clients: int
    groups: int
    probability: float
    rounds: int

    @classmethod
    def of(
        cls, kind: Literal["cyclic", "poisson"], clients: int, clients_per_round: int, rounds: int
    ) -> Participation:
        """About ``clients_per_round`` of ``clients`` in each of ``rounds``.

        Raises:
            ValueError: more a round than there are, or a number that is not positive.
        """
        if not 1 <= clients_per_round <= clients or rounds < 1:
            raise ValueError(f"{clients_per_round} of {clients} clients in {rounds} rounds")
        if kind == "poisson":
            return cls(clients, 1, clients_per_round / clients, rounds)
        return cls(clients, math.ceil(clients / clients_per_round), 1.0, rounds)

    @property
    def turns(self) -> int:
        """In how many rounds one client may take part at most (k)."""
        return self.turns_until(self.rounds)

    def turns_until(self, rounds: int) -> int:
        """The same for the first ``rounds``."""
        return math.ceil(rounds / self.groups)

    @property
    def expected(self) -> float:
        """Clients in a round on average, by which sums are divided, whoever answers."""
        return self.probability * self.clients / self.groups

    def members(self, seed: int) -> list[list[int]]:
        """The places of each group's clients, drawn by the recipe's seed; sizes differ by one at most."""
        order = np.random.default_rng([seed, STREAM]).permutation(self.clients)
        return [sorted(order[group :: self.groups].tolist()) for group in range(self.groups)]

    def cohorts(self, seed: int, key: NoiseKey | None = None) -> list[list[int]]:
        """The places of each training round's clients. Only ``probability`` below 1 uses the key: everybody
        can repeat a draw by the recipe's seed, and amplification by sampling needs a secret one.

        Raises:
            ValueError: it is needed, and not there.
        """
        members = self.members(seed)
        chosen = [members[number % self.groups] for number in range(self.rounds)]
        if self.probability == 1:
            return chosen
        if key is None:
            raise ValueError("who takes part is drawn by a key")
        return [
            [
                client
                for client, drawn in zip(
                    group, key.uniform(number, INCLUSION, len(group)).tolist(), strict=True
                )
                if drawn < self.probability
            ]
            for number, group in enumerate(chosen)
        ]
