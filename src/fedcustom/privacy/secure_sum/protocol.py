"""What both sides of a secure sum compute alike: how many sites are needed, and what is hashed and signed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from ...core.errors import SecureSumError
from .integers import Bits
from .messages import KeyOffer, Roster

VERSION = "fedcustom secure sum 1"

Stage = Literal["keys", "shares", "work", "agree", "unmask"]
"""The exchanges of a round."""


@dataclass(frozen=True)
class RoundId:
    """What is summed: the exchange with that number, from 1, of a run's round."""

    run: str
    number: int
    exchange: int = 1

    def __str__(self) -> str:
        more = f", exchange {self.exchange}" if self.exchange > 1 else ""
        return f"secure sum of round {self.number}{more}"


def offer_statement(round_id: RoundId, offer: KeyOffer) -> bytes:
    """What a site signs of its keys."""
    keys = [offer.sealing.hex(), offer.masking.hex(), offer.commitment.hex()]
    return _statement("keys", *_parts(round_id), offer.name, *keys)


def roster_digest(round_id: RoundId, roster: Roster) -> bytes:
    """SHA-256 of a round and all keys in it."""
    offers = [
        [offer.name, offer.sealing.hex(), offer.masking.hex(), offer.commitment.hex()]
        for offer in roster.offers
    ]
    return hashlib.sha256(_statement("roster", *_parts(round_id), offers)).digest()


def work_digest(roster: bytes, senders: Sequence[str], task: bytes, bits: Bits, count: int) -> bytes:
    """SHA-256 of what all masks depend on: the roster's digest, the sites that have shared their secrets, the
    SHA-256 of the task, and the form of the vector.
    """
    parts = ["work", roster.hex(), list(senders), task.hex(), bits, count]
    return hashlib.sha256(_statement(*parts)).digest()


def vector_digest(work: bytes, name: str) -> bytes:
    """SHA-256 of what tells a masked vector from those of other rounds and sites."""
    return hashlib.sha256(_statement("vector", work.hex(), name)).digest()


def survivor_statement(work: bytes, survivors: Sequence[str]) -> bytes:
    """What a site signs of the survivors."""
    return _statement("survivors", work.hex(), list(survivors))


def share_purpose(roster: bytes, sender: str, receiver: str) -> bytes:
    """What the key is for that seals the shares of one site for another."""
    return _statement("share", roster.hex(), sender, receiver)


def pair_purpose(work: bytes, first: str, second: str) -> bytes:
    """What the seed of a pairwise mask is for; ``first`` adds it, and comes first on the roster."""
    return _statement("pair", work.hex(), first, second)


def self_purpose(work: bytes, name: str) -> bytes:
    """What the seed of a site's own mask is for."""
    return _statement("self", work.hex(), name)


def check_names(what: str, names: Sequence[str], among: Collection[str]) -> None:
    """Refuse a list of sites in which one is there twice, or is not ``among`` those that there can be.

    Raises:
        SecureSumError: names the list, and the site.
    """
    if len(set(names)) < len(names):
        raise SecureSumError(f"{what}: a site is there twice")
    known = set(among)
    for name in names:
        if name not in known:
            raise SecureSumError(f"{what}: {name[:60]!r} is not on the roster")


def _parts(round_id: RoundId) -> list[str | int]:
    return [round_id.run, round_id.number, round_id.exchange]


def _statement(*parts: object) -> bytes:
    """Parts as bytes that no other parts have."""
    return json.dumps([VERSION, *parts], separators=(",", ":")).encode()
