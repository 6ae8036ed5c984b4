"""A site's side of one secure sum: a state machine, messages in, messages out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from ...core.errors import SecureSumError
from .identity import Signer, Verifier
from .integers import Numbers, bits_of
from .masks import add_mask, agreed_seed, derived, draw_key, public_key
from .messages import (
    Agreement,
    Delivery,
    KeyOffer,
    Masked,
    Proof,
    Receipt,
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
    pair_purpose,
    roster_digest,
    self_purpose,
    share_purpose,
    survivor_statement,
    vector_digest,
    work_digest,
)
from .shares import PRIME, SIZE, Random, draw_secret, seal, split, unseal
from .terms import Terms


@dataclass(frozen=True)
class Opening:
    """What a site is about to unmask: of which round, of which task (SHA-256), the sum of which sites."""

    round_id: RoundId
    task: bytes
    survivors: tuple[str, ...]


Note = Callable[[Opening], None]
"""Called before a site reveals anything. It writes the opening to disk, and raises
:class:`~fedcustom.core.errors.SecureSumError` where another opening of the same round is there already.
"""


@dataclass(frozen=True)
class _Shares:
    """What a site holds of another: a share of its mask's seed, and one of its key."""

    seed: bytes
    key: bytes


class SiteRound:
    """A site in one secure sum. Each method answers one request, once and in this order: :meth:`keys`,
    :meth:`shares`, :meth:`mask`, :meth:`agree`, :meth:`unmask`. A request that is refused changes nothing.

    Args:
        name: The site.
        round_id: What is summed.
        terms: How many sites the sum has to be of.
        clients: The sites that may be on the roster.
        signer: The site's lasting key.
        verifier: What is known of the others' lasting keys.
        note: Writes down what is unmasked, before it is.
        random: Random bytes; :func:`os.urandom` but in tests.
    """

    def __init__(
        self,
        name: str,
        round_id: RoundId,
        terms: Terms,
        clients: Collection[str],
        signer: Signer,
        verifier: Verifier,
        note: Note,
        random: Random = os.urandom,
    ) -> None:
        self.name, self.round_id, self.terms, self.clients = name, round_id, terms, frozenset(clients)
        self.signer, self.verifier, self.note, self.random = signer, verifier, note, random
        self.next: Stage | None = "keys"
        self._sealing_key, self._masking_key = draw_key(random), draw_key(random)
        self._seed = draw_secret(random)
        self._offer: KeyOffer
        self._offers: dict[str, KeyOffer] = {}
        self._roster = self._work = self._task = b""
        self._threshold = 0
        self._held: dict[str, _Shares] = {}
        self._survivors: tuple[str, ...] = ()

    @property
    def threshold(self) -> int:
        """How many sites have to stay (t); 0 before the roster is known."""
        return self._threshold

    def keys(self) -> KeyOffer:
        """Fresh public keys, signed.

        Raises:
            SecureSumError: they were asked for before.
        """
        self._expect("keys")
        offer = KeyOffer(
            self.name,
            public_key(self._sealing_key),
            public_key(self._masking_key),
            hashlib.sha256(self._seed).digest(),
            self.signer.credential,
            b"",
        )
        self._offer = replace(offer, signature=self.signer.sign(offer_statement(self.round_id, offer)))
        self.next = "shares"
        return self._offer

    def shares(self, roster: Roster) -> SealedShares:
        """Shares of the two secrets for each site of the roster, sealed for it.

        Raises:
            SecureSumError: the roster has too few or too many sites, one twice, one that is no client, keys
                that are not signed for this round, or other keys of this site than it offered.
        """
        self._expect("shares")
        names, count = roster.names, len(roster.offers)
        check_names(f"{self.round_id}: the roster", names, self.clients)
        threshold = self.terms.needed(count)
        if self.name not in names or roster.offers[names.index(self.name)] != self._offer:
            raise SecureSumError(f"{self.round_id}: the roster lacks the keys that this site offered")
        for offer in roster.offers:
            statement = offer_statement(self.round_id, offer)
            self.verifier.verify(offer.name, offer.credential, statement, offer.signature)
        digest = roster_digest(self.round_id, roster)
        seeds = split(self._seed, count, threshold, self.random)
        keys = split(self._masking_key, count, threshold, self.random)
        sealed = []
        for offer, seed, key in zip(roster.offers, seeds, keys, strict=True):
            if offer.name == self.name:
                held = _Shares(seed, key)
                sealed.append(b"")
                continue
            purpose = share_purpose(digest, self.name, offer.name)
            sealed.append(seal(agreed_seed(self._sealing_key, offer.sealing, purpose), seed + key, purpose))
        self._offers = {offer.name: offer for offer in roster.offers}
        self._held, self._roster, self._threshold = {self.name: held}, digest, threshold
        self.next = "work"
        return SealedShares(tuple(sealed))

    def mask(self, delivery: Delivery, task: bytes, numbers: Numbers) -> Masked:
        """The site's vector, masked in place. ``task`` is the SHA-256 of the task as this site received it.

        Raises:
            SecureSumError: fewer than t sites have shared their secrets, or a share is not for this site.
        """
        self._expect("work")
        senders = delivery.senders
        check_names(f"{self.round_id}: the senders of shares", senders, self._offers)
        if self.name not in senders:
            raise SecureSumError(f"{self.round_id}: this site is not among the senders of shares")
        if len(senders) < self._threshold:
            raise SecureSumError(
                f"{self.round_id}: {len(senders)} sites have shared their secrets, "
                f"{self._threshold} are needed"
            )
        if len(delivery.sealed) != len(senders):
            raise SecureSumError(f"{self.round_id}: as many shares are needed as there are senders")
        opened = {
            sender: self._held[sender] if sender == self.name else self._opened(sender, sealed)
            for sender, sealed in zip(senders, delivery.sealed, strict=True)
        }
        held = {name: opened[name] for name in self._offers if name in opened}
        work = work_digest(self._roster, list(held), task, bits_of(numbers), len(numbers))
        pairs, first = list[PairMask](), False  # whether this site comes first of the two
        for other in held:
            first = first or other == self.name
            if other != self.name:
                pairs.append(pair_mask(self._masking_key, self.name, self._offers[other], work, first))
        own = derived(self._seed, self_purpose(work, self.name))
        self._held, self._work, self._task = held, work, task
        self.next = "agree"
        add_mask(numbers, own)
        for pair in pairs:
            add_mask(numbers, pair.seed, subtract=pair.subtract)
        self._seed = self._masking_key = self._sealing_key = b""  # only shares of them are needed any more
        return Masked(Receipt(task, vector_digest(work, self.name)), numbers)

    def agree(self, survivors: Survivors) -> Agreement:
        """This site's signature on the sites whose vectors arrived.

        Raises:
            SecureSumError: they are too few, this site is not among them, or one has shared no secrets.
        """
        self._expect("agree")
        names = survivors.names
        check_names(f"{self.round_id}: the survivors", names, self._held)
        least = max(self._threshold, self.terms.least_sites)
        if len(names) < least:
            raise SecureSumError(f"{self.round_id}: {len(names)} survivors; {least} are needed")
        if self.name not in names:
            raise SecureSumError(f"{self.round_id}: this site is not among the survivors")
        self._survivors = names
        self.next = "unmask"
        return Agreement(self.signer.sign(survivor_statement(self._work, names)))

    def unmask(self, proof: Proof) -> Reveal:
        """One share of each site: of a survivor's own mask, of another's key.

        Raises:
            SecureSumError: fewer than t survivors have signed the list that this site signed, a signature is
                forged, or the round was unmasked before.
        """
        self._expect("unmask")
        check_names(f"{self.round_id}: the signatures", proof.names, self._survivors)
        if len(proof.signatures) != len(proof.names):
            raise SecureSumError(f"{self.round_id}: as many signatures are needed as there are names")
        if len(proof.names) < self._threshold:
            raise SecureSumError(
                f"{self.round_id}: {len(proof.names)} signatures on the survivors; "
                f"{self._threshold} are needed"
            )
        statement = survivor_statement(self._work, self._survivors)
        for name, signature in zip(proof.names, proof.signatures, strict=True):
            self.verifier.verify(name, self._offers[name].credential, statement, signature)
        self.note(Opening(self.round_id, self._task, self._survivors))
        self.next = None
        alive, held = set(self._survivors), self._held
        self._held = {}
        return Reveal(tuple(own.seed if name in alive else own.key for name, own in held.items()))

    # --- parts ---

    def _expect(self, stage: Stage) -> None:
        if self.next != stage:
            wanted = f"expects {self.next!r}" if self.next else "is over"
            raise SecureSumError(f"{self.round_id}: was asked for {stage!r}, but {wanted}")

    def _opened(self, sender: str, sealed: bytes) -> _Shares:
        """What another site has sealed for this one."""
        purpose = share_purpose(self._roster, sender, self.name)
        key = agreed_seed(self._sealing_key, self._offers[sender].sealing, purpose)
        try:
            plain = unseal(key, sealed, purpose)
        except SecureSumError:
            raise SecureSumError(
                f"{self.round_id}: the share of {sender} is not sealed for {self.name}, or was changed"
            ) from None
        shares = _Shares(plain[:SIZE], plain[SIZE:])
        if len(plain) != 2 * SIZE or any(
            int.from_bytes(each, "little") >= PRIME for each in (shares.seed, shares.key)
        ):
            raise SecureSumError(f"{self.round_id}: the share of {sender} is malformed")
        return shares


@dataclass(frozen=True)
class PairMask:
    """The seed of a mask that two sites have in common, and whether a site subtracts it."""

    seed: bytes
    subtract: bool


def pair_mask(private: bytes, owner: str, other: KeyOffer, work: bytes, owner_first: bool) -> PairMask:
    """The mask that the owner of a masking key has with another site. Which of the two comes first on the
    roster adds it.

    Raises:
        SecureSumError: the other's key is none.
    """
    pair = (owner, other.name) if owner_first else (other.name, owner)
    seed = agreed_seed(private, other.masking, pair_purpose(work, *pair))
    return PairMask(seed, subtract=not owner_first)
