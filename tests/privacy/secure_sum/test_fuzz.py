"""Any order of messages, duplicates, other rounds' messages and garbage: never a wrong sum, never both
secrets of one site.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcustom.core.errors import SecureSumError
from fedcustom.privacy.secure_sum.messages import (
    Agreement,
    Delivery,
    KeyOffer,
    Masked,
    Proof,
    Reveal,
    Roster,
    SealedShares,
    Survivors,
    read_message,
)
from fedcustom.privacy.secure_sum.protocol import RoundId
from fedcustom.privacy.secure_sum.server import ServerRound
from fedcustom.privacy.secure_sum.site import Opening, SiteRound
from fedcustom.privacy.secure_sum.terms import Terms
from helpers.secure_sums import ROUND, TASK, Party, names, plain_sum, signer, vector, verifier

TASKS = (TASK, b"x" * 32)

TAKERS = {
    KeyOffer: "take_keys", SealedShares: "take_shares", Masked: "take_masked",
    Agreement: "take_agreement", Reveal: "take_reveal",
}  # fmt: skip


@settings(max_examples=150)
@given(data=st.data(), count=st.integers(3, 5))
def test_a_network_that_mixes_everything_up_gives_no_wrong_sum(data: Any, count: int) -> None:
    """Answers of sites reach the server late, twice, spoiled, under another's name, or from another round."""
    sites = names(count)
    party, other = Party(sites), Party(sites, round_id=RoundId(ROUND.run, 4))
    server, pool = party.server, list[tuple[str, Any]]()

    def deliver(site: str, answer: Any) -> None:
        with contextlib.suppress(SecureSumError):
            getattr(server, TAKERS[type(answer)])(site, answer)

    def exchange(asked: Any, answer: Callable[[Party, str], Any]) -> None:
        for one in (party, other):
            for name in asked:
                try:
                    pool.append((name, answer(one, name)))
                except SecureSumError:
                    continue
                if one is party and data.draw(st.integers(0, 9)):
                    deliver(*pool[-1])
        for _ in range(data.draw(st.integers(0, 4))):
            name, sent = data.draw(st.sampled_from(pool))
            deliver(data.draw(st.sampled_from([name, *sites])), spoiled(data, sent))

    try:
        exchange(sites, lambda one, name: one.members[name].keys())
        roster = server.roster()
        exchange(roster.names, lambda one, name: one.members[name].shares(roster))
        delivered = server.deliveries()
        exchange(delivered, lambda one, name: one.members[name].mask(delivered[name], TASK, vector(name)))
        survivors = server.survivors()
        exchange(survivors.names, lambda one, name: one.members[name].agree(survivors))
        proof = server.proof()
        exchange(survivors.names, lambda one, name: one.members[name].unmask(proof))
        found = server.opened()
    except SecureSumError:
        return
    assert len(found.sites) >= party.terms.needed(len(roster.names))
    assert (found.numbers == plain_sum(found.sites)).all()


def spoiled(data: Any, sent: Any) -> Any:
    """An answer that is as it was, or not. A vector is a site's own: another one is another sum, not a wrong
    one.
    """
    kind = data.draw(st.sampled_from(["same", "changed"]))
    garbage = data.draw(st.binary(min_size=32, max_size=32))
    if kind == "same":
        return sent
    match sent:
        case KeyOffer():
            key = data.draw(st.sampled_from(["sealing", "masking", "commitment", "signature", "credential"]))
            return replace(sent, **{key: garbage})
        case SealedShares():
            return SealedShares(sent.sealed[:-1])
        case Masked():
            part = data.draw(st.sampled_from(["task", "vector"]))
            return Masked(replace(sent.receipt, **{part: garbage}), sent.numbers)
        case Agreement():
            return Agreement(garbage)
    return Reveal((garbage, *sent.shares[1:]))


@dataclass(frozen=True)
class Revealed:
    """What a site revealed, of whom it thought as survivors."""

    survivors: tuple[str, ...]
    shares: dict[str, bytes]


class World:
    """Sites that take part in two rounds of one number, as after a server's restart, and what they reveal."""

    def __init__(self, count: int) -> None:
        self.sites, self.needed = names(count), Terms().needed(count)
        known, self.notes = verifier(self.sites), {name: list[Opening]() for name in self.sites}
        self.members = [
            {
                name: SiteRound(name, ROUND, Terms(), self.sites, signer(name), known, self.note(name))
                for name in self.sites
            }
            for _ in range(2)
        ]
        self.rosters = [Roster(tuple(one[name].keys() for name in self.sites)) for one in self.members]
        self.sealed: list[tuple[int, str, tuple[str, ...], SealedShares]] = []
        self.signed: list[tuple[str, bytes]] = []
        self.revealed: dict[tuple[int, str], Revealed] = {}

    def note(self, name: str) -> Callable[[Opening], None]:
        """One note a round, whatever is repeated."""

        def write(opening: Opening) -> None:
            if any(known != opening for known in self.notes[name]):
                raise SecureSumError("the round was unmasked before")
            self.notes[name].append(opening)

        return write

    def shares(self, place: int, name: str, roster: Roster) -> None:
        self.sealed.append((place, name, roster.names, self.members[place][name].shares(roster)))

    def mask(
        self, place: int, name: str, senders: Collection[str], task: bytes, *, mixed: bool = False
    ) -> None:
        mine = {
            sender: shares.sealed[receivers.index(name)]
            for where, sender, receivers, shares in self.sealed
            if name in receivers and (where == place or mixed)
        }
        there = tuple(n for n in self.sites if n in mine and (n in senders or n == name))
        self.members[place][name].mask(Delivery(there, tuple(mine[n] for n in there)), task, vector(name))

    def agree(self, place: int, name: str, survivors: Collection[str]) -> None:
        answer = self.members[place][name].agree(Survivors(tuple(survivors)))
        self.signed.append((name, answer.signature))

    def unmask(self, place: int, name: str, signatures: dict[str, bytes]) -> None:
        member = self.members[place][name]
        survivors, senders = member._survivors, tuple(member._held)
        reveal = member.unmask(Proof(tuple(signatures), tuple(signatures.values())))
        assert (place, name) not in self.revealed, "once"
        self.revealed[place, name] = Revealed(survivors, dict(zip(senders, reveal.shares, strict=True)))

    def go_on(self, place: int, stages: int) -> None:
        """As an honest server does, for some stages."""
        steps = [
            lambda name: self.shares(place, name, self.rosters[place]),
            lambda name: self.mask(place, name, self.sites, TASK),
            lambda name: self.agree(place, name, self.sites),
        ]
        for step in steps[:stages]:
            for name in self.sites:
                step(name)

    def check(self) -> None:
        """Of no site were both secrets revealed, and of both rounds together one sum at the most."""
        opened = set()
        for place in (0, 1):
            here = {name: found for (where, name), found in self.revealed.items() if where == place}
            for about in self.sites:
                told = [about in found.survivors for found in here.values() if about in found.shares]
                fewest = min(told.count(True), told.count(False))
                assert fewest < self.needed, f"both secrets of {about} can be put together"
            lists = [(found.survivors, self.notes[name][0].task) for name, found in here.items()]
            opened |= {one for one in lists if lists.count(one) >= self.needed}
        assert len(opened) <= 1, "no two sums whose difference is a site's vector"


@settings(max_examples=150)
@given(data=st.data(), count=st.integers(3, 5))
def test_a_server_that_asks_for_anything_never_gets_both_secrets_of_a_site(data: Any, count: int) -> None:
    """It shows sites rosters, shares, tasks, survivors and signatures of its choice, in any order."""
    world = World(count)

    def request(place: int, name: str) -> None:
        member = world.members[place][name]
        stage = data.draw(st.sampled_from([member.next, member.next, "shares", "work", "agree", "unmask"]))
        some = data.draw(st.lists(st.sampled_from(world.sites), min_size=1, max_size=count, unique=True))
        chosen = data.draw(st.sampled_from([some, world.sites, world.sites]))
        mixed = data.draw(st.integers(0, 7)) == 0
        if stage == "shares":
            offers = dict(zip(world.sites, world.rosters[place].offers, strict=True))
            if mixed:
                offers[chosen[0]] = world.rosters[1 - place].offers[world.sites.index(chosen[0])]
            world.shares(place, name, Roster(tuple(offers[n] for n in chosen)))
        elif stage == "work":
            world.mask(place, name, chosen, TASKS[mixed], mixed=mixed)
        elif stage == "agree":
            world.agree(place, name, chosen)
        elif stage == "unmask":
            world.unmask(place, name, dict(data.draw(st.permutations(world.signed))))

    for place in (0, 1):
        world.go_on(place, data.draw(st.integers(0, 3)))
    for _ in range(data.draw(st.integers(0, 30))):
        try:
            request(data.draw(st.sampled_from([0, 0, 0, 1])), data.draw(st.sampled_from(world.sites)))
        except SecureSumError:
            continue
    world.check()


@settings(max_examples=60)
@given(data=st.data(), count=st.integers(3, 6))
def test_a_server_that_shows_sites_different_survivors(data: Any, count: int) -> None:
    """All goes well until the survivors; each site is then shown a list of its own, in both rounds."""
    world = World(count)
    options = [tuple(world.sites), *(tuple(n for n in world.sites if n != lost) for lost in world.sites)]
    for place in (0, 1):
        world.go_on(place, 2)
        signed: dict[tuple[str, ...], dict[str, bytes]] = {}
        for name in world.sites:
            shown = data.draw(st.sampled_from(options[:2] if data.draw(st.booleans()) else options))
            try:
                world.agree(place, name, shown)
            except SecureSumError:
                continue
            signed.setdefault(shown, {})[name] = world.signed[-1][1]
        for name in world.sites:
            for found in signed.values():
                try:
                    world.unmask(place, name, found)
                except SecureSumError:
                    continue
    world.check()


@given(st.binary(max_size=200), st.sampled_from([KeyOffer, Roster, SealedShares, Delivery, Proof, Reveal]))
def test_garbage_is_no_message(payload: bytes, form: Any) -> None:
    with pytest.raises(SecureSumError):
        read_message(form, payload)


@given(st.permutations(["roster", "deliveries", "survivors", "proof", "opened"]))
def test_a_server_out_of_turn_is_refused(order: list[str]) -> None:
    server = ServerRound(ROUND, Terms(), names(3), TASK, 5, verifier(names(3)))
    for name in order:
        with pytest.raises(SecureSumError, match=r"out of turn|at least 3 are needed"):
            getattr(server, name)()
