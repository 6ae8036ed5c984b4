"""Transport of a deployed run that learns the sum of the sites' changes, and no site's own."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from ..core.errors import SecureSumError, UpdateError
from ..core.files import read_json, write_json
from ..methods import Task
from ..privacy.secure_sum.identity import Verifier
from ..privacy.secure_sum.integers import Numbers
from ..privacy.secure_sum.messages import (
    Agreement,
    KeyOffer,
    Masked,
    Message,
    Receipt,
    Reveal,
    SealedShares,
    read_message,
    write_message,
)
from ..privacy.secure_sum.protocol import RoundId
from ..privacy.secure_sum.server import ServerRound, Sum
from ..transport.messages import values_of
from ..transport.protocol import Reply
from ..transport.secure import check_same_clients, closed
from ..transport.summed import Summation, SumVector
from .nvflare.messenger import SiteReply
from .site.secure_sums import MASKED, MESSAGE
from .task_digest import task_digest
from .transport import RemoteTransport

M = TypeVar("M", bound=Message)

UNSIGNED: Mapping[torch.dtype, Any] = {torch.int32: np.uint32, torch.int64: np.uint64}
"""Integers as they travel, and as they are added up."""


@dataclass
class _Traffic:
    """What a site's messages of a round come to, and why it was lost."""

    bytes_up: int = 0
    seconds: float = 0.0
    reason: str = ""


@dataclass
class _Round:
    """One round under way."""

    server: ServerRound
    number: int
    traffic: dict[str, _Traffic] = field(default_factory=dict)

    @property
    def left(self) -> list[str]:
        """The sites that have not been lost."""
        return [name for name, traffic in self.traffic.items() if not traffic.reason]


class SecureTransport:
    """Transport (:class:`~fedcustom.transport.protocol.SumTransport`) that runs the protocol of
    :mod:`fedcustom.privacy.secure_sum` with the sites of ``remote``.

    Before a sum is opened, ``file`` says of which sites: a round that is repeated after that, since the run
    was stopped, is made with the same ones, for these open no other sum of it. A further exchange of a round
    is a secure sum of its own, of the same sites, or it is not opened.

    Discloses to the server: the sum of the sites' weighted changes, losses, steps and examples, or of the
    figures of which a head is fitted, and who took part.
    """

    def __init__(
        self,
        remote: RemoteTransport,
        summation: Summation,
        verifier: Verifier,
        file: Path,
    ) -> None:
        self.remote, self.summation, self.verifier, self.file = remote, summation, verifier, file

    def exchange(
        self, tasks: Mapping[str, Task], round_number: int, absent: Container[str] = ()
    ) -> Iterator[Reply]:
        """The same as :meth:`exchange_sum`."""
        return self.exchange_sum(tasks, round_number, absent)

    def exchange_sum(
        self, tasks: Mapping[str, Task], round_number: int, absent: Container[str] = ()
    ) -> Iterator[Reply]:
        """Each site's reply without its update, in the tasks' order, and the sum."""
        remote = self.remote
        refused = remote.participants.refused
        remote.connection.include_returned(tasks)
        remote.participants.admit(list(tasks))
        barred = {**self._barred(tasks, round_number), **refused}
        asked = {name: task for name, task in tasks.items() if name not in barred}
        traffic = {name: _Traffic(reason=barred.get(name, "")) for name in tasks}
        found: Sum | None = None
        if asked:
            try:
                check_same_clients(next(iter(tasks.values())), tasks, asked)
                found = self._summed(asked, round_number, traffic)
            except SecureSumError as error:
                remote.connection.note(str(error))
                for each in traffic.values():
                    each.reason = each.reason or str(error)
        remote.memories.advance(round_number)
        replies = []
        for name, task in tasks.items():
            known, summed = traffic[name], found is not None and name in found.sites
            if summed and known.reason:
                remote.connection.note(f"{name} was lost after its change was summed: {known.reason}")
            sent, down = remote.channel.down(task)
            reason = "" if summed else known.reason
            detail = f"{reason}\n" if reason else ""
            replies.append(
                Reply(name, sent, None, reason, detail, down if name in asked else 0, known.bytes_up,
                      known.seconds, summed=summed)
            )  # fmt: skip
        yield from closed(replies, lambda sites: self._opened(asked, found, sites))

    def _barred(self, names: Iterable[str], number: int) -> dict[str, str]:
        """The sites that are not asked, since the sum of the others may have been opened before."""
        begun = read_json(self.file) if self.file.exists() else {}
        if (begun.get("run"), begun.get("round")) != (self.remote.connection.run_id, number):
            return {}
        reason = f"round {number} was begun with other sites, whose sum may have been opened"
        return {name: reason for name in names if name not in begun["sites"]}

    # --- the exchanges ---

    def _summed(self, tasks: Mapping[str, Task], number: int, traffic: dict[str, _Traffic]) -> Sum:
        """The five exchanges.

        Raises:
            SecureSumError: too few sites are left in one of them.
        """
        channel, digests = self.remote.channel, dict[str, bytes]()
        packed = {name: channel.pack_down(task) for name, task in tasks.items()}
        task = next(iter(tasks.values()))
        vector = self._vector(task)
        for name, asked in tasks.items():
            tensors, layout = packed[name].tensors, packed[name].layout
            digest = task_digest(asked.kind, values_of(asked), layout, number, tensors)
            digests[name] = vector.digest(digest)
        first = next(iter(digests.values()))
        if any(digest != first for digest in digests.values()):
            raise SecureSumError("the sites' tasks of this round differ, so that their changes do not add up")
        round_id = RoundId(self.remote.connection.run_id, number, task.place)
        server = ServerRound(
            round_id, self.summation.terms, list(tasks), first, vector.length, self.verifier, vector.bits
        )
        this = _Round(server, number, {name: traffic[name] for name in tasks})
        self._ask(this, "keys", dict.fromkeys(this.left), KeyOffer, server.take_keys)
        roster = server.roster()
        self._ask(this, "shares", dict.fromkeys(this.left, roster), SealedShares, server.take_shares)
        deliveries = server.deliveries()
        sealed = {name: _text(deliveries[name]) for name in this.left}
        sent = {name: tasks[name] for name in sealed}
        replies = self.remote.connection.execute_round(
            sent, packed, number, self.remote.memories.checkpoints, server.threshold, sealed
        )
        for name, reply in replies:
            self._take(this, name, reply, lambda name, reply: server.take_masked(name, _masked(reply)))
            del reply  # before the next one is read
        survivors = server.survivors()
        check_same_clients(task, tasks, survivors.names)
        self._ask(this, "agree", dict.fromkeys(survivors.names, survivors), Agreement, server.take_agreement)
        proof = server.proof()
        opening = {"run": round_id.run, "round": number, "sites": list(survivors.names)}
        opening |= {"exchange": task.place} if task.continues else {}
        write_json(self.file, opening)
        self._ask(this, "unmask", dict.fromkeys(this.left, proof), Reveal, server.take_reveal)
        return server.opened()

    def _ask(
        self,
        this: _Round,
        stage: str,
        messages: Mapping[str, Message | None],
        form: type[M],
        take: Callable[[str, M], None],
    ) -> None:
        """One exchange: what sites answer is taken, and those that fail are lost from then on."""
        texts = {name: _text(message) if message is not None else "" for name, message in messages.items()}
        needed = this.server.threshold or self.summation.terms.needed(len(texts))
        for name, reply in self.remote.connection.secure(texts, stage, this.server.round_id, needed):
            self._take(this, name, reply, lambda name, reply: take(name, read_message(form, _payload(reply))))

    def _take(
        self, this: _Round, name: str, reply: SiteReply, take: Callable[[str, SiteReply], None]
    ) -> None:
        known = this.traffic[name]
        known.bytes_up += reply.size
        known.seconds += reply.seconds
        try:
            if reply.failure:
                raise UpdateError(reply.failure)
            take(name, reply)
        except Exception as error:  # whatever a site sends, the others go on
            known.reason = (str(error).splitlines() or [type(error).__name__])[0]

    # --- the sum ---

    def _opened(self, tasks: Mapping[str, Task], found: Sum | None, sites: tuple[str, ...]) -> Reply:
        """The sum as a reply, whose weight must be that which its sites announced."""
        assert found is not None
        vector, sizes = self._vector(tasks[sites[0]]), self.remote.participants.sizes
        reply = vector.opened(found.numbers, found.sites)
        announced = sum(sizes[name].train if name in sizes else 0 for name in found.sites)
        assert reply.update is not None
        vector.check_weight(reply.update, announced, len(found.sites))
        return reply

    def _vector(self, task: Task) -> SumVector:
        """How the answers to a task are summed."""
        return self.summation.vector(self.remote.channel.down(task)[0])


def _text(message: Message) -> str:
    return write_message(message).decode()


def _payload(reply: SiteReply) -> bytes:
    text: Any = reply.values.get(MESSAGE)
    if not isinstance(text, str):
        raise SecureSumError("an answer of a secure sum holds no message")
    return text.encode()


def _masked(reply: SiteReply) -> Masked:
    """A site's masked vector, a tensor of 32-bit or 64-bit integers, and its receipt."""
    receipt, tensors = read_message(Receipt, _payload(reply)), reply.packed.tensors
    if tensors.keys() != {MASKED} or tensors[MASKED].dtype not in UNSIGNED or tensors[MASKED].dim() != 1:
        raise SecureSumError("an answer of a secure sum holds no masked vector")
    numbers: Numbers = tensors[MASKED].numpy().view(UNSIGNED[tensors[MASKED].dtype])
    return Masked(receipt, numbers)
