"""Conversations with sites: a message to each, sent again as often as jobs end, until all have answered or
the time is up.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from ...core.errors import DeploymentError, WireError
from ...core.files import write_tensors
from ...core.tensors import Tensors
from ...models.park import leave_memory
from ...transport import wire
from ...transport.channel import Packed
from .link import Link, ReceivedMessage


@dataclass(frozen=True)
class Patience:
    """How long sites are waited for, in seconds: for their answers (``round``), for one that has gone while
    enough others answer (``grace``), for enough of them to be there at all (``quorum``).
    """

    round: float = 3600.0
    grace: float = 30.0
    quorum: float = 3600.0


@dataclass(frozen=True)
class SiteReply:
    """What a site said: values and tensors as they travelled, or why there is nothing (``failure``)."""

    values: dict[str, Any] = field(default_factory=dict)
    packed: Packed = field(default_factory=lambda: Packed({}))
    size: int = 0
    failure: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class _StoredReply:
    """An answer as it lies on the disk."""

    head: dict[str, Any]
    body: Path | None
    seconds: float

    @property
    def failure(self) -> str:
        """Why there is no answer, as far as its head tells."""
        if reason := self.head.get("refused"):
            return f"refused: {str(reason)[:500]}"
        return str(self.head.get("error") or "")[:500]


@dataclass
class _Open:
    """A message that has not been answered."""

    head: str
    body: Path | None
    number: int | None = None
    epoch: int = -1
    sent: float = 0.0


class Sites:
    """The sites of a federation, over :class:`Link`.

    ``welcome`` is called for a site before its first message after it came, and may itself converse; it
    returns why the site cannot take part, or nothing. ``most`` is the largest answer, in bytes.
    """

    def __init__(
        self, link: Link, spool: Path, patience: Patience, most: int, note: Callable[[str], None]
    ) -> None:
        self.link, self.patience, self.most, self.note = link, patience, most, note
        shutil.rmtree(spool, ignore_errors=True)
        spool.mkdir(parents=True)
        self.spool = spool
        self.gone_since: dict[str, float] = {}

    def ask(
        self,
        messages: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Tensor]]],
        enough: int,
        seconds: float | None = None,
    ) -> Iterator[tuple[str, SiteReply]]:
        """Give each site its message, a head and tensors, and yield what they say in the messages' order.

        Sites that have gone are waited for as :class:`Patience` says, and for as long as fewer than
        ``enough`` have answered.
        """
        bodies = self._bodies([tensors for _, tensors in messages.values()])
        waiting = {
            site: _Open(json.dumps({**head, "request": secrets.token_hex(8)}), bodies[id(tensors)])
            for site, (head, tensors) in messages.items()
        }
        order, heard = list(messages), dict[str, _StoredReply]()
        begun = time.monotonic()
        deadline = begun + (self.patience.round if seconds is None else seconds)
        self.refresh(messages)
        try:
            while waiting:
                good = sum(not answer.failure for answer in heard.values())
                self._advance(waiting, good >= enough, begun, deadline)
                if not self.link.sites and waiting:
                    continue
                arrival = self.link.receive(timeout=0.25)
                if arrival is not None and (answer := self._heard(arrival, waiting)) is not None:
                    heard[arrival.site] = answer
                    del waiting[arrival.site]
                now = time.monotonic()
                good = sum(not answer.failure for answer in heard.values())
                for site in self._hopeless(waiting, good >= enough, begun, deadline, now):
                    if waiting[site].number is not None and waiting[site].epoch == self.link.epoch:
                        self.link.cancel(waiting[site].number or 0)
                    reason = "no answer in time" if site in self.link.sites else "not connected"
                    heard[site] = _StoredReply({"error": reason}, None, now - begun)
                    del waiting[site]
                while order and order[0] in heard:
                    yield order[0], _read(heard.pop(order.pop(0)))
        except DeploymentError as error:
            for site in waiting:
                heard[site] = _StoredReply({"error": str(error)}, None, time.monotonic() - begun)
        finally:
            for body in set(bodies.values()) - {None}:
                assert body is not None
                body.unlink(missing_ok=True)
        for site in order:
            yield site, _read(heard.pop(site))

    def refresh(self, names: Collection[str]) -> None:
        """Have those of the named sites in the job that have come since it began."""
        missing = (self.link.connected() - self.link.sites) & set(names)
        if self.link.sites and missing:
            self.note(f"{', '.join(sorted(missing))} came back")
            self.link.restart()
            with contextlib.suppress(DeploymentError):  # then the round will find out
                self.link.start([], time.monotonic() + self.patience.grace)

    def close(self) -> None:
        """End the job, and remove what was in passing."""
        self.link.close()
        shutil.rmtree(self.spool, ignore_errors=True)

    # --- parts ---

    def _bodies(self, states: list[Mapping[str, Tensor]]) -> dict[int, Path | None]:
        """A file for each of the states; sites that are sent the same tensors share one."""
        written: dict[tuple[tuple[str, int], ...], Path | None] = {}
        result = {}
        for tensors in states:
            key = tuple(sorted((name, id(tensor)) for name, tensor in tensors.items()))
            if key not in written:
                written[key] = None
                if tensors:
                    path = self.spool / f"{secrets.token_hex(8)}.safetensors"
                    write_tensors(path, tensors)
                    leave_memory(tensors)  # until the answers are there
                    written[key] = path
            result[id(tensors)] = written[key]
        return result

    def _advance(self, waiting: dict[str, _Open], enough: bool, begun: float, deadline: float) -> None:
        """Have a job that runs, and send what has not been sent in it."""
        now = time.monotonic()
        back = (self.link.connected() - self.link.sites) & waiting.keys() if self.link.sites else frozenset()
        if back and not any(site in self.link.sites for site in waiting):
            self.note(f"{', '.join(sorted(back))} came back")
            self.link.restart()
        if not self.link.sites:
            limit = now + self.patience.grace if enough else begun + self.patience.quorum
            self.link.start([site for site in waiting if site not in self.gone_since], max(limit, now + 1.0))
        for site, message in waiting.items():
            if site in self.link.sites and message.epoch != self.link.epoch:
                to = self.spool / f"{secrets.token_hex(8)}.answer"
                message.epoch, message.sent = self.link.epoch, now
                message.number = self.link.send(site, message.head, message.body, to, self.most)

    def _heard(self, arrival: ReceivedMessage, waiting: Mapping[str, _Open]) -> _StoredReply | None:
        """An arrival, if it answers a message that is waited for."""
        message = waiting.get(arrival.site)
        if message is None or message.number != arrival.number:
            if arrival.body is not None:
                arrival.body.unlink(missing_ok=True)
            return None
        if arrival.lost:
            self.note(f"{arrival.site} is gone ({arrival.lost})")
            message.epoch = -1
            return None
        return _StoredReply(arrival.head, arrival.body, time.monotonic() - message.sent)

    def _hopeless(
        self, waiting: Mapping[str, _Open], enough: bool, begun: float, deadline: float, now: float
    ) -> list[str]:
        """The sites that are not waited for any longer: those that are late, and those that have been gone
        for too long, be it since an earlier round.
        """
        for site in waiting:
            if site in self.link.sites:
                self.gone_since.pop(site, None)
            else:
                self.gone_since.setdefault(site, now)
        late = deadline if enough else max(deadline, begun + self.patience.quorum)

        def limit(site: str) -> float:
            if site not in self.gone_since:
                return late
            if not enough:
                return begun + self.patience.quorum
            return min(late, self.gone_since[site] + self.patience.grace)

        return [site for site in waiting if now > limit(site)]


def _read(heard: _StoredReply) -> SiteReply:
    """A site's answer, of which nothing is trusted but that it is JSON. Its tensors are mapped from their
    file, which is gone when they are.
    """
    try:
        if reason := heard.failure:
            return SiteReply(failure=reason, seconds=heard.seconds)
        values = heard.head.get("values")
        if not isinstance(values, dict):
            raise WireError("an answer without values")
        tensors: Tensors = {}
        if heard.body is not None:
            tensors = safetensors.torch.load_file(heard.body)
        for name, tensor in tensors.items():
            if tensor.dtype not in wire.DTYPES:
                raise WireError(f"{name}: {tensor.dtype} cannot travel")
        packed = Packed(tensors, heard.head.get("layout"))
        return SiteReply(values, packed, packed.length(values), seconds=heard.seconds)
    except (SafetensorError, OSError, ValueError) as error:
        reason = f"a message is malformed: {(str(error).splitlines() or [''])[0]}"
        return SiteReply(failure=reason, seconds=heard.seconds)
    except WireError as error:
        return SiteReply(failure=str(error), seconds=heard.seconds)
    finally:
        if heard.body is not None:
            heard.body.unlink(missing_ok=True)
