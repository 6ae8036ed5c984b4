"""The server's side of one secure sum: a state machine, messages in, messages out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Any

import numpy as np

from ...core.errors import SecureSumError
from .identity import Verifier
from .integers import Bits, Numbers, zeros
from .masks import add_mask, agreed_seed, derived, public_key
from .messages import (
    Agreement,
    Delivery,
    KeyOffer,
    Masked,
    Proof,
    Reveal,
    Roster,
    SealedShares,
    Survivors,
)
from .protocol import (
    RoundId,
    Stage,
    check_names,
    offer_statement,
    roster_digest,
    self_purpose,
    survivor_statement,
    vector_digest,
    work_digest,
)
from .shares import PRIME, coefficients_at_zero, join
from .site import pair_mask
from .terms import Terms

MOST_ATTEMPTS = 200
"""Choices of shares that are tried where some of them are wrong."""


@dataclass(frozen=True)
class Sum:
    """The sum of the vectors of some sites."""

    numbers: Numbers
    sites: tuple[str, ...]


class ServerRound:
    """The server in one secure sum. For each exchange, in this order, it takes the answers that come, one by
    one, and is then asked for what follows from them: :meth:`roster`, :meth:`deliveries`, :meth:`survivors`,
    :meth:`proof`, :meth:`opened`. An answer that is refused is its site's failure; the site counts as lost
    from that exchange on.

    Args:
        round_id: What is summed.
        terms: How many sites the sum has to be of.
        sites: The sites that are asked, in their order.
        task: SHA-256 of the task that all of them are sent.
        count: Numbers of a vector.
        bits: Of each of them.
        verifier: What is known of the sites' lasting keys.
    """

    def __init__(
        self,
        round_id: RoundId,
        terms: Terms,
        sites: Sequence[str],
        task: bytes,
        count: int,
        verifier: Verifier,
        bits: Bits = 32,
    ) -> None:
        self.round_id, self.terms, self.sites, self.verifier = round_id, terms, tuple(sites), verifier
        self.task, self.count, self.bits = task, count, bits
        self.stage: Stage | None = "keys"
        self.threshold = 0
        self._offers: dict[str, KeyOffer] = {}
        self._sealed: dict[str, SealedShares] = {}
        self._arrived: set[str] = set()
        self._signed: dict[str, bytes] = {}
        self._revealed: dict[str, Reveal] = {}
        self._senders: tuple[str, ...] = ()
        self._survivors: tuple[str, ...] = ()
        self._roster = self._work = b""
        self._total = zeros(0, bits)

    # --- keys ---

    def take_keys(self, site: str, offer: KeyOffer) -> None:
        """A site's keys.

        Raises:
            SecureSumError: they are another's, not signed for this round, or come twice.
        """
        self._expect("keys", site, self.sites, self._offers)
        if offer.name != site:
            raise SecureSumError(f"{self.round_id}: {site} offers keys of another site")
        self.verifier.verify(site, offer.credential, offer_statement(self.round_id, offer), offer.signature)
        for key in (offer.sealing, offer.masking):  # one of small order would fail at everybody
            agreed_seed(bytes(32), key, b"trial")
        self._offers[site] = offer

    def roster(self) -> Roster:
        """Everybody's keys, for all that offered some.

        Raises:
            SecureSumError: too few sites, or too many.
        """
        self._close("keys")
        self.threshold = self.terms.needed(len(self._offers))
        offers = {name: self._offers[name] for name in self.sites if name in self._offers}
        found = Roster(tuple(offers.values()))
        self._offers, self._roster, self.stage = offers, roster_digest(self.round_id, found), "shares"
        return found

    # --- shares ---

    def take_shares(self, site: str, shares: SealedShares) -> None:
        """A site's sealed shares.

        Raises:
            SecureSumError: the site is not on the roster, or there are not as many as sites.
        """
        self._expect("shares", site, self._offers, self._sealed)
        if len(shares.sealed) != len(self._offers):
            raise SecureSumError(f"{self.round_id}: {site} sent {len(shares.sealed)} shares")
        self._sealed[site] = shares

    def deliveries(self) -> dict[str, Delivery]:
        """What each site is sent of the others' shares.

        Raises:
            SecureSumError: too few sites have shared their secrets.
        """
        self._close("shares")
        self._enough(len(self._sealed), "have shared their secrets")
        self._senders = tuple(name for name in self._offers if name in self._sealed)
        self._work = work_digest(self._roster, self._senders, self.task, self.bits, self.count)
        places = {name: place for place, name in enumerate(self._offers)}
        found = {
            name: Delivery(
                self._senders, tuple(self._sealed[sender].sealed[places[name]] for sender in self._senders)
            )
            for name in self._senders
        }
        self._sealed, self.stage = {}, "work"
        self._total = zeros(self.count, self.bits)
        return found

    # --- work ---

    def take_masked(self, site: str, masked: Masked) -> None:
        """A site's masked vector, which is added to the others' and not kept.

        Raises:
            SecureSumError: it has another form, or belongs to another task.
        """
        self._expect("work", site, self._senders, self._arrived)
        if masked.receipt.task != self.task:
            raise SecureSumError(f"{self.round_id}: {site} worked on another task than it was sent")
        if masked.receipt.vector != vector_digest(self._work, site):
            raise SecureSumError(f"{self.round_id}: {site} sent another round's vector, or another site's")
        numbers: Any = masked.numbers
        if numbers.dtype != self._total.dtype or numbers.shape != self._total.shape:
            raise SecureSumError(
                f"{self.round_id}: {site} sent {numbers.shape} numbers of {numbers.dtype}, not "
                f"{self._total.shape} of {self._total.dtype}"
            )
        np.add(self._total, numbers, out=self._total)
        self._arrived.add(site)

    def survivors(self) -> Survivors:
        """The sites whose vectors arrived.

        Raises:
            SecureSumError: they are too few.
        """
        self._close("work")
        self._enough(len(self._arrived), "have sent their vectors")
        self._survivors = tuple(name for name in self._senders if name in self._arrived)
        self.stage = "agree"
        return Survivors(self._survivors)

    # --- agree ---

    def take_agreement(self, site: str, agreement: Agreement) -> None:
        """A site's signature on the survivors.

        Raises:
            SecureSumError: it is forged.
        """
        self._expect("agree", site, self._survivors, self._signed)
        statement = survivor_statement(self._work, self._survivors)
        self.verifier.verify(site, self._offers[site].credential, statement, agreement.signature)
        self._signed[site] = agreement.signature

    def proof(self) -> Proof:
        """The signatures.

        Raises:
            SecureSumError: they are too few.
        """
        self._close("agree")
        self._enough(len(self._signed), "have signed the survivors")
        self.stage = "unmask"
        return Proof(tuple(self._signed), tuple(self._signed.values()))

    # --- unmask ---

    def take_reveal(self, site: str, reveal: Reveal) -> None:
        """A site's shares of the others' secrets.

        Raises:
            SecureSumError: there are not as many as senders, or one is none.
        """
        self._expect("unmask", site, self._survivors, self._revealed)
        if len(reveal.shares) != len(self._senders):
            raise SecureSumError(f"{self.round_id}: {site} revealed {len(reveal.shares)} shares")
        if any(int.from_bytes(share, "little") >= PRIME for share in reveal.shares):
            raise SecureSumError(f"{self.round_id}: {site} revealed a share that is none")
        self._revealed[site] = reveal

    def opened(self) -> Sum:
        """The sum of the survivors' vectors.

        Raises:
            SecureSumError: too few shares came, or they do not give the sites' secrets.
        """
        self._close("unmask")
        self._enough(len(self._revealed), "have revealed their shares")
        alive, places = set(self._survivors), {name: place for place, name in enumerate(self._offers)}
        for number, name in enumerate(self._senders):
            shares = {places[site] + 1: reveal.shares[number] for site, reveal in self._revealed.items()}
            secret = self._joined(name, shares, of_seed=name in alive)
            if name in alive:
                add_mask(self._total, derived(secret, self_purpose(self._work, name)), subtract=True)
                continue
            for other in self._survivors:  # its part of the pairs, as it would have added it
                first = places[name] < places[other]
                pair = pair_mask(secret, name, self._offers[other], self._work, first)
                add_mask(self._total, pair.seed, subtract=pair.subtract)
        self.stage = None
        return Sum(self._total, self._survivors)

    # --- parts ---

    def _joined(self, name: str, shares: dict[int, bytes], *, of_seed: bool) -> bytes:
        """A site's secret, which its offer tells right from wrong: a wrong share spoils only some choices."""
        offer = self._offers[name]
        for chosen in islice(combinations(shares, self.threshold), MOST_ATTEMPTS):
            secret = join(coefficients_at_zero(chosen), [shares[place] for place in chosen])
            if of_seed and hashlib.sha256(secret).digest() == offer.commitment:
                return secret
            if not of_seed and public_key(secret) == offer.masking:
                return secret
        raise SecureSumError(f"{self.round_id}: the shares of {name} do not give what it has committed to")

    def _expect(self, stage: Stage, site: str, among: Sequence[str] | dict[str, Any], done: Any) -> None:
        self._close(stage)
        check_names(f"{self.round_id}: an answer to {stage!r}", [site], among)
        if site in done:
            raise SecureSumError(f"{self.round_id}: {site} has answered {stage!r} before")

    def _close(self, stage: Stage) -> None:
        if self.stage != stage:
            wanted = f"is at {self.stage!r}" if self.stage else "is over"
            raise SecureSumError(f"{self.round_id}: {stage!r} is out of turn, the round {wanted}")

    def _enough(self, count: int, what: str) -> None:
        if count < self.threshold:
            raise SecureSumError(f"{self.round_id}: {count} sites {what}, {self.threshold} are needed")
