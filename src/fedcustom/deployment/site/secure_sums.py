"""A site's part in secure sums: the round under way, and what it has unmasked, on its disk."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ...core.errors import DeploymentError, RunError, SecureSumError
from ...core.files import read_json, write_json
from ...privacy.secure_sum.identity import Signer, Verifier
from ...privacy.secure_sum.integers import Numbers
from ...privacy.secure_sum.messages import (
    Delivery,
    Masked,
    Message,
    Proof,
    Roster,
    Survivors,
    read_message,
    write_message,
)
from ...privacy.secure_sum.protocol import RoundId
from ...privacy.secure_sum.site import Opening, SiteRound
from ...privacy.secure_sum.terms import Terms

AskedStage = Literal["keys", "shares", "agree", "unmask"]
"""Exchanges that are requests of their own; the masked vector answers the task."""

STAGES: tuple[AskedStage, ...] = ("keys", "shares", "agree", "unmask")

MOST_EXCHANGES = 1024
"""Exchanges of one round: those of a fit of the head with the most steps that a recipe may ask for, and some
more."""

MESSAGE, MASKED = "message", "masked"
"""Keys of a message: its text, and the tensor of a masked vector."""


class Identity(NamedTuple):
    """A site's lasting key, and what it knows of the others'."""

    signer: Signer
    verifier: Verifier


Identify = Callable[[], Identity]


@dataclass
class Unmasked:
    """What a site has unmasked, in one file a run, which is never deleted: of each exchange of a round one
    sum, and of the same sites in all exchanges of a round.
    """

    folder: Path

    def note(self, opening: Opening) -> None:
        """Write down what is about to be unmasked.

        Raises:
            SecureSumError: another sum of the same exchange was unmasked before, or the exchange before it
                was unmasked for other sites or not at all, or the file is damaged.
        """
        file = self.folder / f"{opening.round_id.run}.json"
        try:
            known: dict[str, Any] = read_json(file) if file.exists() else {}
        except RunError:
            raise SecureSumError("this site's list of unmasked sums is damaged") from None
        if not isinstance(known, dict):
            raise SecureSumError("this site's list of unmasked sums is damaged")
        number, exchange = opening.round_id.number, opening.round_id.exchange
        key = f"{number}.{exchange}"
        before, sites = known.get(f"{number}.{exchange - 1}", {}), sorted(opening.survivors)
        if exchange > 1 and before.get("sites") != sites:
            raise SecureSumError(
                f"{opening.round_id}: the exchange before it was not unmasked for the same sites, and what "
                "sums of different sites show together is more than a sum"
            )
        entry = {"task": opening.task.hex(), "sites": sites}
        if known.setdefault(key, entry) != entry:
            raise SecureSumError(
                f"{opening.round_id}: was unmasked before for other sites or another task, and is not again"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(file, known)


class SecureSums:
    """A site in the secure sums of one run. One sum is under way at a time: asked for keys, a site forgets
    all of the one before. A sum is that of one exchange of a round.
    """

    def __init__(
        self, name: str, run: str, clients: Collection[str], terms: Terms, identify: Identify, folder: Path
    ) -> None:
        self.name, self.run, self.clients, self.terms = name, run, list(clients), terms
        self.identify, self.unmasked = identify, Unmasked(folder)
        self.round: SiteRound | None = None

    def answer(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values of the answer to a request of one exchange.

        Raises:
            SecureSumError: it is not what the protocol allows.
        """
        stage, number, text = values.get("stage"), values.get("round"), values.get(MESSAGE, "")
        exchange = values.get("exchange", 1)
        if stage not in STAGES or type(number) is not int or not 1 <= number < 2**31:
            raise SecureSumError("a request of a secure sum names no exchange or no round")
        if type(exchange) is not int or not 1 <= exchange <= MOST_EXCHANGES:
            raise SecureSumError("a request of a secure sum names no exchange of its round")
        if not isinstance(text, str):
            raise SecureSumError("a request of a secure sum holds no message")
        round_id = RoundId(self.run, number, exchange)
        return {MESSAGE: write_message(self._answer(stage, round_id, text.encode())).decode()}

    def _answer(self, stage: AskedStage, round_id: RoundId, payload: bytes) -> Message:
        if stage == "keys":
            self.round = SiteRound(
                self.name, round_id, self.terms, self.clients, *self.identify(), self.unmasked.note
            )
            return self.round.keys()
        current = self.of(round_id.number, round_id.exchange)
        if stage == "shares":
            return current.shares(read_message(Roster, payload))
        if stage == "agree":
            return current.agree(read_message(Survivors, payload))
        return current.unmask(read_message(Proof, payload))

    def of(self, number: int, exchange: int = 1) -> SiteRound:
        """The sum under way, if it is that of this exchange of this round.

        Raises:
            SecureSumError: it is another one, or none.
        """
        wanted = RoundId(self.run, number, exchange)
        if self.round is None or self.round.round_id != wanted:
            raise SecureSumError(f"no {wanted} is under way here")
        return self.round

    def expect_work(self, number: int, exchange: int = 1) -> None:
        """Refuse a task before the work on it begins, where its answer could not be masked. ``exchange`` is
        the place of the task in its round, by its kind, whatever the server says.

        Raises:
            SecureSumError: the sites have not exchanged keys and shares for this sum.
        """
        if self.of(number, exchange).next != "work":
            raise SecureSumError(f"round {number}: a task came before its keys and shares, or a second time")

    def needed(self, number: int, exchange: int = 1) -> int:
        """How many sites have to stay in a sum (t), by its roster as this site knows it."""
        return self.of(number, exchange).threshold

    def mask(self, number: int, delivery: str, task: bytes, numbers: Numbers, exchange: int = 1) -> Masked:
        """A vector, masked in place, with the shares of the others that came with the task."""
        return self.of(number, exchange).mask(read_message(Delivery, delivery.encode()), task, numbers)


def kit_identity(kit: Path, peers: Collection[str]) -> Identify:
    """The identity of a kit, read when it is needed: a certificate may be renewed meanwhile."""

    def identify() -> Identity:
        from ..nvflare.identity import CertificateVerifier, KitSigner

        return Identity(KitSigner(kit), CertificateVerifier.of(kit / "startup", peers))

    return identify


def no_identity() -> Identity:
    """That of a site without a kit.

    Raises:
        DeploymentError: always.
    """
    raise DeploymentError("secure sums need the key and certificate of a site's kit")
