"""Secure sums among sites of this process, some of which are lost on the way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedcustom.core.errors import SecureSumError
from fedcustom.privacy.secure_sum.identity import Ed25519Signer, Ed25519Verifier
from fedcustom.privacy.secure_sum.protocol import RoundId
from fedcustom.privacy.secure_sum.server import ServerRound, Sum
from fedcustom.privacy.secure_sum.site import Opening, SiteRound
from fedcustom.privacy.secure_sum.terms import Terms

TASK = b"t" * 32
ROUND = RoundId("0" * 16, 3)


def names(count: int) -> list[str]:
    return [f"site-{number}" for number in range(count)]


@functools.cache
def signer(name: str) -> Ed25519Signer:
    return Ed25519Signer()


def verifier(sites: Collection[str]) -> Ed25519Verifier:
    return Ed25519Verifier({name: signer(name).credential for name in sites})


def vector(name: str, count: int = 5, kind: Any = np.uint32) -> Any:
    """A site's own numbers, spread over the whole ring."""
    seed = int.from_bytes(name.encode(), "little") % 2**32
    return np.random.default_rng(seed).integers(0, np.iinfo(kind).max, count, kind, endpoint=True)


def plain_sum(sites: Collection[str], count: int = 5, kind: Any = np.uint32) -> Any:
    total = np.zeros(count, kind)
    for name in sites:
        total += vector(name, count, kind)
    return total


@dataclass
class Party:
    """All sites and the server of one round; ``notes`` are what sites wrote down before they unmasked."""

    sites: list[str]
    terms: Terms = field(default_factory=Terms)
    round_id: RoundId = ROUND
    count: int = 5
    kind: Any = np.uint32
    task: bytes = TASK
    tasks: Mapping[str, bytes] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    notes: dict[str, list[Opening]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = verifier(self.sites)
        bits: Any = 8 * np.dtype(self.kind).itemsize
        self.server = ServerRound(self.round_id, self.terms, self.sites, self.task, self.count, known, bits)
        self.members = {
            name: SiteRound(
                name, self.round_id, self.terms, self.sites, signer(name), known,
                self.notes.setdefault(name, []).append,
            )
            for name in self.sites
        }  # fmt: skip

    def ask(
        self, asked: Collection[str], answer: Callable[[str], Any], take: Callable[[str, Any], None]
    ) -> None:
        """Have some sites answer; one that fails, or whose answer is refused, is lost."""
        for name in asked:
            try:
                take(name, answer(name))
            except SecureSumError as error:
                self.errors[name] = str(error)

    def run(self, lost: Mapping[str, str] | None = None) -> Sum:
        """A whole round. A site in ``lost`` never answers the exchange that is named there, nor any later."""
        gone, server, members = dict(lost or {}), self.server, self.members
        stages = ["keys", "shares", "work", "agree", "unmask"]

        def there(stage: str, among: Collection[str]) -> list[str]:
            at = stages.index(stage)
            return [name for name in among if name not in gone or stages.index(gone[name]) > at]

        self.ask(there("keys", self.sites), lambda name: members[name].keys(), server.take_keys)
        roster = server.roster()
        self.ask(there("shares", roster.names), lambda name: members[name].shares(roster), server.take_shares)
        deliveries = server.deliveries()

        def masked(name: str) -> Any:
            numbers = vector(name, self.count, self.kind)
            return members[name].mask(deliveries[name], self.tasks.get(name, self.task), numbers)

        self.ask(there("work", deliveries), masked, server.take_masked)
        survivors = server.survivors()
        self.ask(
            there("agree", survivors.names), lambda n: members[n].agree(survivors), server.take_agreement
        )
        proof = server.proof()
        self.ask(there("unmask", survivors.names), lambda n: members[n].unmask(proof), server.take_reveal)
        return server.opened()
