"""The protocol: equal to the plain sum whoever is lost and when; everything that is not right is refused."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedcustom.core.errors import SecureSumError
from fedcustom.privacy.secure_sum.identity import Ed25519Signer
from fedcustom.privacy.secure_sum.messages import (
    Agreement,
    Delivery,
    KeyOffer,
    Proof,
    Receipt,
    Reveal,
    Roster,
    SealedShares,
    Survivors,
    read_message,
    write_message,
)
from fedcustom.privacy.secure_sum.protocol import RoundId, vector_digest
from fedcustom.privacy.secure_sum.site import Opening
from fedcustom.privacy.secure_sum.terms import Terms
from helpers.secure_sums import ROUND, TASK, Party, names, plain_sum, signer, vector

STAGES = ("keys", "shares", "work", "agree", "unmask")


def expected(sites: list[str], lost: Mapping[str, str]) -> list[str] | None:
    """The sites of the sum, by counting; None where too few are left in any exchange."""
    offered = [name for name in sites if lost.get(name) != "keys"]
    if len(offered) < 3:
        return None
    needed = 2 * len(offered) // 3 + 1
    left = [
        len([n for n in offered if n not in lost or STAGES.index(lost[n]) > STAGES.index(stage)])
        for stage in STAGES[1:]
    ]
    if min(left) < needed:
        return None
    return [name for name in offered if lost.get(name) not in ("shares", "work")]


def check(sites: list[str], lost: Mapping[str, str]) -> None:
    wanted, party = expected(sites, lost), Party(sites)
    if wanted is None:
        with pytest.raises(SecureSumError, match="needed"):
            party.run(lost)
        return
    found = party.run(lost)
    assert list(found.sites) == wanted
    assert (found.numbers == plain_sum(wanted)).all()
    assert not party.errors


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("count", [3, 4, 5])
def test_every_drop_out_set_at_every_stage(count: int, stage: str) -> None:
    sites = names(count)
    for size in range(count + 1):
        for gone in itertools.combinations(sites, size):
            check(sites, dict.fromkeys(gone, stage))


@pytest.mark.parametrize("count", [3, 4])
def test_every_order_of_drop_outs(count: int) -> None:
    """Each site is lost at any of the exchanges, or never: a complete walk of the protocol's states."""
    sites = names(count)
    for choice in itertools.product((None, *STAGES), repeat=count):
        check(sites, {name: stage for name, stage in zip(sites, choice, strict=True) if stage})


def test_drop_outs_of_five_sites_in_all_exchanges() -> None:
    """However many are lost in each of the exchanges; who they are differs from case to case."""
    sites = names(5)
    for number, choice in enumerate(itertools.combinations_with_replacement((None, *STAGES), 5)):
        turned = [*sites[number % 5 :], *sites[: number % 5]]
        check(sites, {name: stage for name, stage in zip(turned, choice, strict=True) if stage})


@pytest.mark.parametrize("kind", [np.uint32, np.uint64])
def test_long_vectors_of_either_size(kind: Any) -> None:
    party = Party(names(4), count=300_001, kind=kind)
    found = party.run({"site-2": "work"})
    assert found.numbers.dtype == kind
    assert (found.numbers == plain_sum(found.sites, 300_001, kind)).all()


def test_a_masked_vector_says_nothing_by_itself() -> None:
    """Bits of masked zeros are those of a fair coin, and no vector is masked as another is."""
    party = Party(names(3), count=20_000)
    zeros = []
    mask = party.server.take_masked

    def keep(name: str, masked: Any) -> None:
        zeros.append(masked.numbers - vector(name, 20_000))
        mask(name, masked)

    party.server.take_masked = keep  # type: ignore[method-assign]
    party.run()
    for one in zeros:
        share = np.unpackbits(one.view(np.uint8)).mean()
        assert abs(share - 0.5) < 5 * 0.5 / (32 * 20_000) ** 0.5
    assert not (zeros[0] == zeros[1]).any() or (zeros[0] == zeros[1]).mean() < 1e-3


# --- how many ---


@pytest.mark.parametrize(
    ("count", "colluding", "threshold", "needed"),
    [
        (3, 1, None, 3), (4, 1, None, 3), (5, 1, None, 4), (6, 1, None, 5), (10, 1, None, 7),
        (64, 1, None, 43),
        (4, 2, None, 4), (5, 3, None, 5), (10, 5, None, 8), (10, 1, 9, 9), (10, 1, 2, 7),
    ],
)  # fmt: skip
def test_how_many_have_to_stay(count: int, colluding: int, threshold: int | None, needed: int) -> None:
    found = Terms(threshold, colluding).needed(count)
    assert found == needed
    assert 2 * found - count > colluding, "no two lists of survivors"
    assert found - colluding >= 2, "nobody's vector is the rest of the sum"


@pytest.mark.parametrize(
    ("terms", "count", "message"),
    [
        (Terms(), 2, "at least 3 are needed"),
        (Terms(least_sites=5), 4, "at least 5 are needed"),
        (Terms(least_sites=1), 2, "at least 3 are needed"),
        (Terms(threshold=5), 4, r"5 would have to stay \(secure_sum.threshold = 5"),
        (Terms(colluding=3), 4, r"5 would have to stay .*secure_sum.colluding = 3"),
        (Terms(), 129, "at most 128 are possible"),
    ],
)
def test_impossible_numbers_of_sites(terms: Terms, count: int, message: str) -> None:
    with pytest.raises(SecureSumError, match=message):
        terms.needed(count)
    with pytest.raises(SecureSumError, match=message):
        Party(names(count), terms).run()


# --- a site that is not honest, at the server ---


def test_a_site_that_received_another_task_is_lost() -> None:
    party = Party(names(4), tasks={"site-1": b"x" * 32})
    found = party.run()
    assert "site-1" not in found.sites
    assert (found.numbers == plain_sum(found.sites)).all()
    assert "site-1 worked on another task than it was sent" in party.errors["site-1"]


def test_a_vector_of_another_site_or_round_is_refused() -> None:
    """A network that confuses names or delays answers makes no wrong sum."""
    party, other = Party(names(3)), Party(names(3), round_id=RoundId(ROUND.run, 4))
    for one in (party, other):
        one.ask(one.sites, lambda name, one=one: one.members[name].keys(), one.server.take_keys)
        roster = one.server.roster()
        one.ask(
            one.sites,
            lambda name, one=one, roster=roster: one.members[name].shares(roster),
            one.server.take_shares,
        )
    delivered, earlier = party.server.deliveries(), other.server.deliveries()
    first, second, _ = party.sites
    own = party.members[first].mask(delivered[first], TASK, vector(first))
    old = other.members[second].mask(earlier[second], TASK, vector(second))
    for sent in (own, old):
        with pytest.raises(SecureSumError, match="site-1 sent another round's vector, or another site's"):
            party.server.take_masked(second, sent)
    party.server.take_masked(first, own)


def test_forged_keys_shares_and_signatures_lose_their_site() -> None:
    party = Party(names(4))
    server, members = party.server, party.members
    offer = members["site-0"].keys()
    for spoiled, reason in (
        (replace(offer, signature=bytes(64)), "its signature is forged"),
        (replace(offer, masking=bytes(31) + b"\1"), "its signature is forged"),
        (replace(offer, credential=signer("site-1").credential), "not known to be its own"),
        (replace(offer, name="site-1"), "offers keys of another site"),
    ):
        with pytest.raises(SecureSumError, match=reason):
            server.take_keys("site-0", spoiled)
    with pytest.raises(SecureSumError, match="'stranger' is not on the roster"):
        server.take_keys("stranger", replace(offer, name="stranger"))
    server.take_keys("site-0", offer)
    with pytest.raises(SecureSumError, match="site-0 has answered 'keys' before"):
        server.take_keys("site-0", offer)
    with pytest.raises(SecureSumError, match="'shares' is out of turn, the round is at 'keys'"):
        server.take_shares("site-0", SealedShares(()))
    with pytest.raises(SecureSumError, match="1 sites: at least 3 are needed"):
        server.roster()


def test_keys_of_small_order_are_refused_at_once() -> None:
    from fedcustom.privacy.secure_sum.protocol import offer_statement

    party = Party(names(3))
    offer = replace(party.members["site-0"].keys(), masking=bytes(32))
    offer = replace(offer, signature=signer("site-0").sign(offer_statement(ROUND, offer)))
    with pytest.raises(SecureSumError, match="no X25519 key"):
        party.server.take_keys("site-0", offer)


def test_a_forged_agreement_and_wrong_shares_at_the_end() -> None:
    party, forged = Party(names(4)), Agreement(Ed25519Signer().sign(b""))
    take, reveal = party.server.take_agreement, party.server.take_reveal

    def spoil(name: str, answer: Any) -> None:
        take(name, forged if name == "site-2" else answer)

    def lie(name: str, answer: Any) -> None:
        if name == "site-3":
            with pytest.raises(SecureSumError, match="site-3 revealed 1 shares"):
                reveal(name, Reveal(answer.shares[:1]))
            with pytest.raises(SecureSumError, match="a share that is none"):
                reveal(name, Reveal((b"\xff" * 32,) * 4))
            answer = Reveal((bytes(32),) * 4)
        reveal(name, answer)

    party.server.take_agreement = spoil  # type: ignore[method-assign]
    party.server.take_reveal = lie  # type: ignore[method-assign]
    found = party.run()
    assert "its signature is forged" in party.errors["site-2"]
    assert (found.numbers == plain_sum(names(4))).all(), "the other three shares are enough"


def test_wrong_shares_of_too_many_are_an_error_and_no_wrong_sum() -> None:
    party = Party(names(4))
    reveal = party.server.take_reveal

    def lie(name: str, answer: Any) -> None:
        reveal(name, Reveal((bytes(32),) * 4) if name in ("site-2", "site-3") else answer)

    party.server.take_reveal = lie  # type: ignore[method-assign]
    with pytest.raises(SecureSumError, match="the shares of site-0 do not give what it has committed to"):
        party.run()


def test_a_vector_of_another_form_loses_its_site() -> None:
    for spoil in (lambda v: v[:-1], lambda v: v.astype(np.uint64), lambda v: v.view(np.int32)):
        party = Party(names(4))
        take = party.server.take_masked

        def spoiled(name: str, masked: Any, take: Any = take, spoil: Any = spoil) -> None:
            take(name, replace(masked, numbers=spoil(masked.numbers)) if name == "site-1" else masked)

        party.server.take_masked = spoiled  # type: ignore[method-assign]
        found = party.run()
        assert "site-1" not in found.sites
        assert (found.numbers == plain_sum(found.sites)).all()


# --- a server that is not honest, at a site ---


class Attacked(Party):
    """A party whose exchanges are made one by one."""

    def offered(self) -> Roster:
        for name in self.sites:
            self.server.take_keys(name, self.members[name].keys())
        return self.server.roster()

    def delivered(self) -> dict[str, Delivery]:
        roster = self.offered()
        for name in self.sites:
            self.server.take_shares(name, self.members[name].shares(roster))
        return self.server.deliveries()

    def masked(self) -> Survivors:
        for name, delivery in self.delivered().items():
            masked = self.members[name].mask(delivery, self.tasks.get(name, self.task), vector(name))
            if self.tasks:
                expected = vector_digest(self.server._work, name)
                masked = replace(masked, receipt=Receipt(self.task, expected))  # the server's lie
            self.server.take_masked(name, masked)
        return self.server.survivors()


def refused(message: str) -> Any:
    return pytest.raises(SecureSumError, match=message)


def test_a_roster_that_is_not_right() -> None:
    party = Attacked(names(4))
    roster, first = party.offered(), party.members["site-0"]
    other = Attacked(names(4)).offered()
    later = Attacked(names(4), round_id=RoundId(ROUND.run, ROUND.number + 1)).offered()
    offers = roster.offers
    spoiled = replace(offers[1], masking=offers[2].masking)
    stranger = KeyOffer("stranger", *[offers[1].sealing, offers[1].masking, offers[1].commitment], b"", b"")
    for wrong, reason in (
        (Roster(offers[:2]), "2 sites: at least 3 are needed"),
        (Roster((*offers[:3], offers[2])), "a site is there twice"),
        (Roster(offers[1:]), "lacks the keys that this site offered"),
        (other, "lacks the keys that this site offered"),
        (Roster((*offers[:1], spoiled, *offers[2:])), "site-1: its signature is forged"),
        (Roster((*offers[:3], later.offers[3])), "site-3: its signature is forged"),
        (Roster((*offers, stranger)), "'stranger' is not on the roster"),
    ):
        with refused(reason):
            first.shares(wrong)
    first.shares(roster)
    with refused("was asked for 'shares', but expects 'work'"):
        first.shares(roster)
    with refused("was asked for 'keys'"):
        first.keys()


def test_shares_that_are_for_another_site_or_another_round() -> None:
    party, other = Attacked(names(4)), Attacked(names(4))
    deliveries, foreign = party.delivered(), other.delivered()
    first, own = party.members["site-0"], deliveries["site-0"]

    def with_sealed(place: int, sealed: bytes) -> Delivery:
        return replace(own, sealed=(*own.sealed[:place], sealed, *own.sealed[place + 1 :]))

    for wrong, reason in (
        (with_sealed(1, deliveries["site-2"].sealed[1]), "share of site-1 is not sealed for site-0"),
        (with_sealed(1, own.sealed[2]), "share of site-1 is not sealed for site-0"),
        (with_sealed(2, foreign["site-0"].sealed[2]), "share of site-2 is not sealed for site-0"),
        (with_sealed(3, b""), "share of site-3 is not sealed for site-0"),
        (Delivery(own.senders[:2], own.sealed[:2]), "2 sites have shared their secrets, 3 are needed"),
        (Delivery(own.senders[1:], own.sealed[1:]), "this site is not among the senders"),
        (Delivery(own.senders, own.sealed[1:]), "as many shares are needed"),
        (Delivery((*own.senders, "site-9"), (*own.sealed, b"")), "'site-9' is not on the roster"),
        (Delivery((*own.senders, "site-1"), (*own.sealed, own.sealed[1])), "a site is there twice"),
    ):
        numbers = vector("site-0")
        with refused(reason):
            first.mask(wrong, party.task, numbers)
        assert (numbers == vector("site-0")).all(), "what is refused changes nothing"
    first.mask(own, party.task, vector("site-0"))
    with refused("was asked for 'work', but expects 'agree'"):
        first.mask(own, party.task, vector("site-0"))


def test_survivors_that_are_not_right() -> None:
    party = Attacked(names(4))
    survivors, first = party.masked(), party.members["site-0"]
    for wrong, reason in (
        (("site-0", "site-1"), "2 survivors; 3 are needed"),
        (("site-1", "site-2", "site-3"), "this site is not among the survivors"),
        (("site-0", "site-1", "site-1"), "a site is there twice"),
        (("site-0", "site-1", "site-9"), "'site-9' is not on the roster"),
    ):
        with refused(reason):
            first.agree(Survivors(wrong))
    first.agree(survivors)
    with refused("was asked for 'agree', but expects 'unmask'"):
        first.agree(Survivors(("site-0", "site-1", "site-2")))


def test_a_proof_that_is_not_right() -> None:
    party = Attacked(names(4))
    survivors, members = party.masked(), party.members
    fewer = Survivors(survivors.names[:3])
    signed = {n: members[n].agree(survivors if n != "site-2" else fewer).signature for n in party.sites}
    proof = Proof(tuple(signed), tuple(signed.values()))
    first = members["site-0"]
    for wrong, reason in (
        (Proof(proof.names[:2], proof.signatures[:2]), "2 signatures on the survivors; 3 are needed"),
        (proof, "site-2: its signature is forged"),
        (Proof(proof.names[:2] * 2, proof.signatures[:2] * 2), "a site is there twice"),
        (Proof(("site-0", "site-1", "site-9"), proof.signatures[:3]), "'site-9' is not on the roster"),
        (Proof(proof.names, proof.signatures[1:]), "as many signatures are needed"),
    ):
        with refused(reason):
            first.unmask(wrong)
    assert not party.notes["site-0"], "nothing was written down, for nothing was revealed"
    right = Proof(("site-0", "site-1", "site-3"), (signed["site-0"], signed["site-1"], signed["site-3"]))
    first.unmask(right)
    with refused("was asked for 'unmask', but is over"):
        first.unmask(right)
    with refused("site-0: its signature is forged"):
        members["site-2"].unmask(Proof(("site-0", "site-1", "site-2"), tuple(signed.values())[:3]))


def test_two_models_do_not_cancel() -> None:
    """A server that sends one site another model, and hides that: the sites' signatures do not agree, and
    nothing is unmasked (arXiv 2111.07380).
    """
    party = Attacked(names(4), tasks={"site-3": b"x" * 32})
    survivors, members = party.masked(), party.members
    signed = {name: members[name].agree(survivors).signature for name in party.sites}
    for name in ("site-0", "site-3"):
        with refused("its signature is forged"):
            members[name].unmask(Proof(tuple(signed), tuple(signed.values())))
    same = {name: signed[name] for name in party.sites[:3]}
    members["site-0"].unmask(Proof(tuple(same), tuple(same.values())))
    assert party.notes["site-0"] == [Opening(ROUND, party.task, tuple(party.sites))]


def test_nothing_is_revealed_when_the_note_cannot_be_written() -> None:
    party = Party(names(3))

    def note(opening: Opening) -> None:
        raise SecureSumError("the round was unmasked before")

    party.members["site-1"].note = note
    with refused("2 sites have revealed their shares, 3 are needed"):
        party.run()
    assert party.errors == {"site-1": "the round was unmasked before"}


# --- as bytes ---


def test_messages_are_read_as_they_are_written() -> None:
    party = Attacked(names(3))
    roster = party.offered()
    shares = party.members["site-0"].shares(roster)
    for message in (roster.offers[0], roster, shares, Delivery(("a",), (b"x",)), Survivors(("a", "b"))):
        assert read_message(type(message), write_message(message)) == message


@pytest.mark.parametrize(
    ("form", "payload", "reason"),
    [
        (Survivors, b"", "malformed"),
        (Survivors, b"[]", "must be a JSON object"),
        (Survivors, b'{"names": 3}', "Survivors of a secure sum: names: input should be a valid"),
        (Survivors, b'{"names": ["a"], "more": 1}', "unexpected keyword argument|extra"),
        (Survivors, b'{"names": [""]}', "names.0: string should have at least 1 character"),
        (Agreement, b'{"signature": "%%"}', "signature: data should be valid base64"),
        (Reveal, b'{"shares": ["AAAA"]}', "shares.0: .*at least 32 bytes"),
        (Roster, b'{"offers": [{"name": "a"}]}', "offers.0.sealing"),
        (Survivors, b"\xff\xfe", "not UTF-8"),
    ],
)
def test_messages_that_are_none(form: Any, payload: bytes, reason: str) -> None:
    with refused(reason):
        read_message(form, payload)
