"""(h) Secure sums: one mask, shares for 50 sites, and what a round costs a site and the server."""

from __future__ import annotations

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fedcustom.privacy.secure_sum.identity import Ed25519Signer, Ed25519Verifier
from fedcustom.privacy.secure_sum.masks import add_mask
from fedcustom.privacy.secure_sum.protocol import RoundId
from fedcustom.privacy.secure_sum.server import ServerRound
from fedcustom.privacy.secure_sum.shares import draw_secret, split
from fedcustom.privacy.secure_sum.site import SiteRound
from fedcustom.privacy.secure_sum.terms import Terms

from ..harness import spread

ADAPTER, MODEL = 76_000, 22_700_000
"""Numbers of an adapter, and of MiniLM-L6."""

TASK, SERVER = b"t" * 32, "server"


def measure(*, repetitions: int = 7) -> Any:
    """Seconds of the primitives, and of whole rounds by sites and numbers."""
    sizes = {"adapter": ADAPTER, "model": MODEL}
    rounds = [(3, ADAPTER), (10, ADAPTER), (50, ADAPTER), (3, MODEL), (10, MODEL)]
    return {
        "masks": {name: _mask(count, repetitions) for name, count in sizes.items()},
        "shares": _timed(lambda: split(draw_secret(os.urandom), 50, 34, os.urandom), repetitions),
        "rounds": [
            {"sites": sites, "numbers": numbers, **_rounds(sites, numbers, 3 if numbers == ADAPTER else 1)}
            for sites, numbers in rounds
        ],
    }


def _mask(count: int, repetitions: int) -> dict[str, float]:
    numbers = np.zeros(count, np.uint32)
    return _timed(lambda: add_mask(numbers, bytes(32)), repetitions)


def _timed(act: Callable[[], object], repetitions: int) -> dict[str, float]:
    act()
    found = []
    for _ in range(repetitions):
        begun = time.perf_counter()
        act()
        found.append(time.perf_counter() - begun)
    return spread(found)


def _rounds(sites: int, numbers: int, repetitions: int) -> dict[str, Any]:
    """Seconds of the slowest site and of the server, without and with one site lost after it has shared."""
    pairs = [one_round(sites, numbers) for _ in range(repetitions)]
    found = {"site": spread([site for site, _ in pairs]), "server": spread([server for _, server in pairs])}
    if sites > 3:
        lost = [one_round(sites, numbers, lost=True)[1] for _ in range(repetitions)]
        found["server, one lost"] = spread(lost)
    return found


class Clock:
    """Seconds that each party has spent."""

    def __init__(self) -> None:
        self.spent = defaultdict[str, float](float)

    @contextlib.contextmanager
    def of(self, who: str) -> Iterator[None]:
        """Count what is done meanwhile."""
        begun = time.perf_counter()
        yield
        self.spent[who] += time.perf_counter() - begun


def one_round(count: int, numbers: int, *, lost: bool = False) -> tuple[float, float]:
    """Seconds of the slowest of so many sites in one round, and of the server."""
    names = [f"site-{number}" for number in range(count)]
    signers = {name: Ed25519Signer() for name in names}
    known = Ed25519Verifier({name: signer.credential for name, signer in signers.items()})
    round_id, clock, members = RoundId("0" * 16, 1), Clock(), dict[str, SiteRound]()
    server = ServerRound(round_id, Terms(), names, TASK, numbers, known)
    for name in names:
        with clock.of(name):
            members[name] = SiteRound(
                name, round_id, Terms(), names, signers[name], known, lambda opening: None
            )
            offer = members[name].keys()
        with clock.of(SERVER):
            server.take_keys(name, offer)
    with clock.of(SERVER):
        roster = server.roster()
    for name in names:
        with clock.of(name):
            shares = members[name].shares(roster)
        with clock.of(SERVER):
            server.take_shares(name, shares)
    with clock.of(SERVER):
        deliveries = server.deliveries()
    for name in names[: -1 if lost else None]:
        own = np.ones(numbers, np.uint32)
        with clock.of(name):
            masked = members[name].mask(deliveries[name], TASK, own)
        with clock.of(SERVER):
            server.take_masked(name, masked)
    with clock.of(SERVER):
        survivors = server.survivors()
    for name in survivors.names:
        with clock.of(name):
            agreement = members[name].agree(survivors)
        with clock.of(SERVER):
            server.take_agreement(name, agreement)
    with clock.of(SERVER):
        proof = server.proof()
    for name in survivors.names:
        with clock.of(name):
            reveal = members[name].unmask(proof)
        with clock.of(SERVER):
            server.take_reveal(name, reveal)
    with clock.of(SERVER):
        found = server.opened()
    if not (found.numbers == len(survivors.names)).all():
        raise RuntimeError("the masked sum is not the plain sum")
    return max(seconds for who, seconds in clock.spent.items() if who != SERVER), clock.spent[SERVER]
