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

MESSAGE, MASKED = "message", "masked"
"""Keys of a message: its text, and the tensor of a masked vector."""


class Identity(NamedTuple):
    """A site's lasting key, and what it knows of the others'."""

    signer: Signer
    verifier: Verifier


Identify = Callable[[], Identity]


@dataclass
class Unmasked:
    """What a site has unmasked, in one file a run, which is never deleted: of each round one sum."""

    folder: Path

    def note(self, opening: Opening) -> None:
        """Write down what is about to be unmasked.

        Raises:
            SecureSumError: another sum of the same round was unmasked before, or the file is damaged.
        """
        file = self.folder / f"{opening.round_id.run}.json"
        try:
            known: dict[str, Any] = read_json(file) if file.exists() else {}
        except RunError:
            raise SecureSumError("this site's list of unmasked sums is damaged") from None
        if not isinstance(known, dict):
            raise SecureSumError("this site's list of unmasked sums is damaged")
        key = f"{opening.round_id.number}.{opening.round_id.exchange}"
        entry = {"task": opening.task.hex(), "sites": sorted(opening.survivors)}
        if known.setdefault(key, entry) != entry:
            raise SecureSumError(
                f"{opening.round_id}: was unmasked before for other sites or another task, and is not again"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(file, known)


class SecureSums:
    """A site in the secure sums of one run. One round is under way at a time: asked for keys, a site forgets
    all of the round before.
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
        if stage not in STAGES or type(number) is not int or not 1 <= number < 2**31:
            raise SecureSumError("a request of a secure sum names no exchange or no round")
        if not isinstance(text, str):
            raise SecureSumError("a request of a secure sum holds no message")
        return {MESSAGE: write_message(self._answer(stage, number, text.encode())).decode()}

    def _answer(self, stage: AskedStage, number: int, payload: bytes) -> Message:
        if stage == "keys":
            identity, round_id = self.identify(), RoundId(self.run, number)
            self.round = SiteRound(
                self.name, round_id, self.terms, self.clients, *identity, self.unmasked.note
            )
            return self.round.keys()
        current = self.of(number)
        if stage == "shares":
            return current.shares(read_message(Roster, payload))
        if stage == "agree":
            return current.agree(read_message(Survivors, payload))
        return current.unmask(read_message(Proof, payload))

    def of(self, number: int) -> SiteRound:
        """The round under way, if it is that one.

        Raises:
            SecureSumError: it is another one, or none.
        """
        if self.round is None or self.round.round_id.number != number:
            raise SecureSumError(f"no secure sum of round {number} is under way here")
        return self.round

    def expect_work(self, number: int) -> None:
        """Refuse a task before the work on it begins, where its answer could not be masked.

        Raises:
            SecureSumError: the sites have not exchanged keys and shares for this round.
        """
        if self.of(number).next != "work":
            raise SecureSumError(f"round {number}: a task came before its keys and shares, or a second time")

    def needed(self, number: int) -> int:
        """How many sites have to stay in a round (t), by its roster as this site knows it."""
        return self.of(number).threshold

    def mask(self, number: int, delivery: str, task: bytes, numbers: Numbers) -> Masked:
        """A vector, masked in place, with the shares of the others that came with the task."""
        return self.of(number).mask(read_message(Delivery, delivery.encode()), task, numbers)


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
