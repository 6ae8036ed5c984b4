"""Messenger: delivers a request to each site, again after every job that ends, until all sites have replied
or time is up.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ...core.bounded_json import first_line, write_json
from ...core.errors import DeploymentError, WireError
from ...core.files import write_tensors
from ...core.tensors import Tensors
from ...models.memory_mapping import leave_memory
from ...transport import gate, wire
from ...transport.channel import Packed
from .job_channel import JobChannel, ReceivedMessage


@dataclass(frozen=True)
class Timeouts:
    """Timeouts of requests, in seconds.

    Attributes:
        round: how long sites may take to reply.
        grace: how long a site that has disconnected is waited for while enough others reply.
        quorum: how long to wait until enough sites are connected at all.
    """

    round: float = 3600.0
    grace: float = 30.0
    quorum: float = 3600.0


@dataclass(frozen=True)
class Request:
    """Request to a site: a head (what JSON can hold) and tensors."""

    head: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class SiteReply:
    """Reply of a site: values and tensors as they travelled, or why there are none (``failure``).

    ``size`` is the message's length in bytes, ``seconds`` the time from the request to the reply.
    """

    values: dict[str, Any] = field(default_factory=dict)
    packed: Packed = field(default_factory=lambda: Packed({}))
    size: int = 0
    failure: str = ""
    seconds: float = 0.0

    @property
    def refused(self) -> bool:
        """Whether the site's policy forbids what was asked, so that asking again is in vain."""
        return self.failure.startswith("refused")


@dataclass(frozen=True)
class _StoredReply:
    """A reply as it lies on the disk."""

    head: dict[str, Any]
    body: Path | None
    seconds: float

    @property
    def failure(self) -> str:
        """Why there is no usable reply, as far as its head tells."""
        if reason := self.head.get("refused"):
            return f"refused: {str(reason)[:500]}"
        return str(self.head.get("error") or "")[:500]


@dataclass
class _PendingRequest:
    """A request without a reply: its number in the job with number ``job``, sent at time ``sent``."""

    head: str
    body: Path | None
    number: int | None = None
    job: int = -1
    sent: float = 0.0


class Messenger:
    """Messenger to the sites of a federation, over a :class:`JobChannel`.

    ``spool`` is the folder for tensors on their way, ``max_bytes`` the largest reply that is accepted.
    """

    def __init__(
        self,
        channel: JobChannel,
        spool: Path,
        timeouts: Timeouts,
        max_bytes: int,
        note: Callable[[str], None],
    ) -> None:
        self.channel, self.timeouts, self.max_bytes, self.note = channel, timeouts, max_bytes, note
        shutil.rmtree(spool, ignore_errors=True)
        spool.mkdir(parents=True)
        self.spool = spool
        self.disconnected_since: dict[str, float] = {}

    def request(
        self, requests: Mapping[str, Request], min_replies: int, timeout: float | None = None
    ) -> Iterator[tuple[str, SiteReply]]:
        """Send each site its request and yield the replies, in the requests' order.

        Disconnected sites are waited for as :class:`Timeouts` says, and as long as fewer than
        ``min_replies`` sites have replied without a failure. ``timeout`` replaces ``Timeouts.round``.
        """
        bodies = self._write_bodies([request.tensors for request in requests.values()])
        pending = {
            site: _PendingRequest(
                write_json({**request.head, "request": secrets.token_hex(8)}), bodies[id(request.tensors)]
            )
            for site, request in requests.items()
        }
        order, replies = list(requests), dict[str, _StoredReply]()
        sound = 0  # replies without a failure, whether or not they have been yielded
        started = time.monotonic()
        deadline = started + (self.timeouts.round if timeout is None else timeout)
        self.include_returned(requests)
        try:
            while pending:
                self._send_pending(pending, sound >= min_replies, started)
                if not self.channel.sites and pending:
                    continue
                message = self.channel.receive(timeout=0.25)
                if message is not None and (reply := self._match(message, pending)) is not None:
                    replies[message.site] = reply
                    sound += not reply.failure
                    del pending[message.site]
                now = time.monotonic()
                for site in self._expired(pending, sound >= min_replies, started, deadline, now):
                    number = pending[site].number
                    if number is not None and pending[site].job == self.channel.job_number:
                        self.channel.cancel(number)
                    reason = "no answer in time" if site in self.channel.sites else "not connected"
                    if site not in self.channel.members():
                        reason = "revoked, or removed from the federation"
                    replies[site] = _StoredReply({"error": reason}, None, now - started)
                    del pending[site]
                while order and order[0] in replies:
                    yield order[0], _read(replies.pop(order.pop(0)))
        except DeploymentError as error:
            for site in pending:
                replies[site] = _StoredReply({"error": str(error)}, None, time.monotonic() - started)
        finally:
            for body in set(bodies.values()) - {None}:
                assert body is not None
                body.unlink(missing_ok=True)
        for site in order:
            yield site, _read(replies.pop(site))

    def include_returned(self, names: Collection[str]) -> None:
        """Start a new job if any of the named sites is connected but not in the current one."""
        returned = (self.channel.connected() - self.channel.sites) & set(names)
        if self.channel.sites and returned:
            self.note(f"{', '.join(sorted(returned))} came back")
            self.channel.restart()
            with contextlib.suppress(DeploymentError):  # the next request will report it
                self.channel.start([], time.monotonic() + self.timeouts.grace)

    def close(self) -> None:
        """End the job, and remove the spool folder."""
        self.channel.close()
        shutil.rmtree(self.spool, ignore_errors=True)

    # --- parts of a request ---

    def _write_bodies(self, bodies: list[Mapping[str, Tensor]]) -> dict[int, Path | None]:
        """Write tensors to files, by the identity of their mapping; sites that are sent the same tensors
        share a file.
        """
        written: dict[tuple[tuple[str, int], ...], Path | None] = {}
        paths = {}
        for tensors in bodies:
            key = tuple(sorted((name, id(tensor)) for name, tensor in tensors.items()))
            if key not in written:
                written[key] = None
                if tensors:
                    path = self.spool / f"{secrets.token_hex(8)}.safetensors"
                    write_tensors(path, tensors)
                    leave_memory(tensors)  # until the replies are there
                    written[key] = path
            paths[id(tensors)] = written[key]
        return paths

    def _send_pending(self, pending: dict[str, _PendingRequest], quorum_met: bool, started: float) -> None:
        """Make sure that a job runs, and send the requests that have not been sent in it."""
        now, channel = time.monotonic(), self.channel
        returned = (channel.connected() - channel.sites) & pending.keys() if channel.sites else frozenset()
        if returned and not any(site in channel.sites for site in pending):
            self.note(f"{', '.join(sorted(returned))} came back")
            channel.restart()
        if not channel.sites:
            limit = now + self.timeouts.grace if quorum_met else started + self.timeouts.quorum
            expected = [site for site in pending if site not in self.disconnected_since]
            channel.start(expected, max(limit, now + 1.0))
        for site, request in pending.items():
            if site in channel.sites and request.job != channel.job_number:
                reply_path = self.spool / f"{secrets.token_hex(8)}.answer"
                request.job, request.sent = channel.job_number, now
                request.number = channel.send(site, request.head, request.body, reply_path, self.max_bytes)

    def _match(self, message: ReceivedMessage, pending: Mapping[str, _PendingRequest]) -> _StoredReply | None:
        """The message as a reply, if it belongs to a pending request."""
        request = pending.get(message.site)
        if request is None or request.number != message.number:
            if message.body is not None:
                message.body.unlink(missing_ok=True)
            return None
        if message.lost:
            self.note(f"{message.site} is gone ({message.lost})")
            request.job = -1
            return None
        return _StoredReply(message.head, message.body, time.monotonic() - request.sent)

    def _expired(
        self,
        pending: Mapping[str, _PendingRequest],
        quorum_met: bool,
        started: float,
        deadline: float,
        now: float,
    ) -> list[str]:
        """The sites that are not waited for any longer: those that are late, and those that have been
        disconnected for too long, be it since an earlier round. A site that is back does not count as
        disconnected while others are at work in the job: the next job includes it.
        """
        connected, others_at_work = self.channel.connected(), any(s in self.channel.sites for s in pending)
        for site in pending:
            if site in self.channel.sites:
                self.disconnected_since.pop(site, None)
            elif others_at_work and site in connected:
                self.disconnected_since[site] = now
            else:
                self.disconnected_since.setdefault(site, now)
        quorum_deadline = started + self.timeouts.quorum
        reply_deadline = deadline if quorum_met else max(deadline, quorum_deadline)

        members = self.channel.members()

        def limit(site: str) -> float:
            if site not in members:
                return started - 1.0  # whatever the others do, it will not come
            if site not in self.disconnected_since:
                return reply_deadline
            if not quorum_met:
                return quorum_deadline
            return min(reply_deadline, self.disconnected_since[site] + self.timeouts.grace)

        return [site for site in pending if now > limit(site)]


def _read(stored: _StoredReply) -> SiteReply:
    """Read a stored reply, of which nothing is trusted but that its head is JSON. Its tensors are mapped
    from their file, whose space is freed with them.
    """
    try:
        if reason := stored.failure:
            return SiteReply(failure=reason, seconds=stored.seconds)
        values = stored.head.get("values")
        if not isinstance(values, dict):
            raise WireError("an answer without values")
        tensors: Tensors = {}
        if stored.body is not None:
            tensors = gate.read_tensor_file(stored.body, wire.MAX_BYTES)
        packed = Packed(tensors, stored.head.get("layout"))
        return SiteReply(values, packed, packed.length(values), seconds=stored.seconds)
    except WireError as error:
        return SiteReply(failure=str(error), seconds=stored.seconds)
    except Exception as error:  # whatever a site sends, the others go on
        return SiteReply(failure=f"a message is malformed: {first_line(error)}", seconds=stored.seconds)
    finally:
        if stored.body is not None:
            stored.body.unlink(missing_ok=True)
