"""Message channel from the run's process to the sites, over a chain of the engine's jobs."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import DeploymentError
from .bridge import Bridge, BridgeError, BridgeListener
from .jobs import FINISHED, Session

START_TIMEOUT = 60.0
"""Seconds that a job may take to start before it is aborted and another is submitted."""

SETTLING_TIME = 8.0
"""Seconds that a new job waits for the sites that are expected in it."""

POLL_INTERVAL = 1.5
"""Seconds between queries for the connected sites."""


@dataclass(frozen=True)
class ReceivedMessage:
    """Reply of a site to the request with this number: a head and a file of tensors; or ``lost``, the reason
    why none will come.
    """

    number: int
    site: str
    head: dict[str, Any]
    body: Path | None
    lost: str


class JobChannel:
    """Message channel to the sites, through one job of the engine after another.

    A job that ends for whatever reason is followed by another with the sites that are connected then.
    Requests without a reply have to be sent again in it: :attr:`job_number` has changed. ``note`` is told
    what happens. Whoever supervises the engine sets ``engine_failure`` to the reason if it does not start.

    Only members are put into a job; ``members`` says who they are at this moment. A job that holds a site
    that is no member any more is ended, and followed by one without it.

    Attributes:
        sites: names of the sites in the current job; empty while there is none.
    """

    def __init__(
        self,
        kit: Path,
        listener: BridgeListener,
        note: Callable[[str], None],
        members: Callable[[], frozenset[str]],
    ) -> None:
        self.session, self.note, self.listener, self.members = Session(kit), note, listener, members
        self.sites: frozenset[str] = frozenset()
        self.job_number = 0
        self.engine_failure = ""
        self._bridge: Bridge | None = None
        self._job = ""
        self._events: queue.Queue[tuple[Bridge, dict[str, Any] | None]] = queue.Queue()
        self._numbers = itertools.count()
        self._polled_at, self._registered = 0.0, dict[str, str]()
        self._members: dict[str, str] = {}  # the job's sites, as they were registered when it was submitted
        threading.Thread(target=self._accept, daemon=True).start()

    def connected(self) -> frozenset[str]:
        """Names of the members connected to the server, in the job or not; none while the server is down.

        A site that has registered again since the job began takes no part in it any more, because its engine
        was restarted: it is taken out of :attr:`sites`.
        """
        if time.monotonic() - self._polled_at > POLL_INTERVAL:
            try:
                self._registered = self.session.registrations()
            except DeploymentError:
                self._registered = {}
            self._polled_at = time.monotonic()
            for site in sorted(self.sites):
                before, now = self._members.get(site), self._registered.get(site)
                if before and now and before != now:
                    self.note(f"{site} registered again: it has left job {self.job_number}")
                    self._remove(site)
        return frozenset(self._registered) & self.members()

    def start(self, expected: Collection[str], deadline: float) -> None:
        """Make sure that a job runs, with all connected sites. A new one first waits a few seconds
        (``SETTLING_TIME``) for the ``expected`` sites.

        Raises:
            DeploymentError: no job runs by the ``deadline`` (:func:`time.monotonic`).
        """
        reason, settled = "no site is connected", time.monotonic() + SETTLING_TIME
        while self._bridge is None:
            now = time.monotonic()
            if self.engine_failure:
                raise DeploymentError(self.engine_failure)
            if now > deadline:
                raise DeploymentError(f"no job could be started: {reason}")
            sites = sorted(self.connected())
            if not sites or (now < settled and not set(expected) & self.members() <= set(sites)):
                time.sleep(0.3)
                continue
            try:
                self._members = dict(self._registered)
                self._job = self.session.submit(sites)
                reason = self._wait_for_controller(min(deadline, time.monotonic() + START_TIMEOUT))
            except DeploymentError as error:
                reason = str(error)
                time.sleep(1.0)

    def restart(self) -> None:
        """End the job; :meth:`start` then starts one with the sites that are connected by then."""
        if self._bridge is not None:
            with contextlib.suppress(BridgeError):
                self._bridge.send({"kind": "end"})
        self._disconnect("a new job follows")

    def send(self, site: str, head: str, body: Path | None, reply_path: Path, max_bytes: int) -> int:
        """Send a request to a site and return its number. The reply's tensors, of ``max_bytes`` at most, are
        written to ``reply_path``.
        """
        number = next(self._numbers)
        message = {
            "kind": "send", "number": number, "site": site, "head": head, "to": str(reply_path),
            "most": max_bytes, "body": str(body) if body else None,
        }  # fmt: skip
        try:
            assert self._bridge is not None
            self._bridge.send(message)
        except BridgeError as error:
            self._disconnect(str(error))
        return number

    def cancel(self, number: int) -> None:
        """Wait no longer for the reply to a request."""
        if self._bridge is not None:
            with contextlib.suppress(BridgeError):
                self._bridge.send({"kind": "cancel", "number": number})

    def receive(self, timeout: float) -> ReceivedMessage | None:
        """The next reply, or None after ``timeout`` seconds; a site that is lost is taken out of
        :attr:`sites`.
        """
        if removed := self.sites - self.members():
            self.note(f"{', '.join(sorted(removed))}: revoked or removed; taken out of the job")
            self.restart()
            return None
        try:
            bridge, message = self._events.get(timeout=timeout)
        except queue.Empty:
            return None
        if bridge is not self._bridge:
            if message is not None and message.get("kind") == "ready":
                if self._bridge is None:
                    self._connect(bridge, message)
                else:  # a job that was given up, and started all the same
                    bridge.close()
            return None
        if message is None:
            self._disconnect("its connection broke")
            return None
        body = message.get("body")
        lost = str(message.get("lost", ""))
        if lost:
            self._remove(str(message["site"]))
        return ReceivedMessage(
            int(message["number"]), str(message["site"]), message.get("head") or {},
            Path(body) if body else None, lost,
        )  # fmt: skip

    def close(self) -> None:
        """End the job, the session and the local connection."""
        self.restart()
        if self._job:
            self._wait_for_end(time.monotonic() + 15.0)
        self.session.close()
        self.listener.close()

    def _accept(self) -> None:
        while True:
            try:
                bridge = self.listener.accept()
            except BridgeError:
                return
            threading.Thread(target=self._read_events, args=(bridge,), daemon=True).start()

    def _read_events(self, bridge: Bridge) -> None:
        with contextlib.suppress(BridgeError):
            while True:
                self._events.put((bridge, bridge.receive()))
        self._events.put((bridge, None))

    def _wait_for_controller(self, deadline: float) -> str:
        """Wait for the submitted job's controller to connect; returns the reason if it does not."""
        queried = time.monotonic()
        while time.monotonic() < deadline:
            self.receive(timeout=0.2)
            if self._bridge is not None:
                return ""
            if time.monotonic() - queried > 2.0:
                queried = time.monotonic()
                status = self.session.status(self._job)
                if status.startswith(FINISHED):
                    return f"the engine ended the job: {status.removeprefix(FINISHED).strip(':')}"
        self.session.abort(self._job)
        return "the engine did not start the job in time"

    def _wait_for_end(self, deadline: float) -> None:
        with contextlib.suppress(DeploymentError):
            while time.monotonic() < deadline:
                if self.session.status(self._job).startswith(FINISHED):
                    return
                time.sleep(0.5)
            self.session.abort(self._job)

    def _connect(self, bridge: Bridge, ready: dict[str, Any]) -> None:
        """Use the connection of a job that has started."""
        self._bridge, self.sites = bridge, frozenset(map(str, ready["sites"]))
        self.job_number += 1
        self.note(f"job {self.job_number} with {', '.join(sorted(self.sites))}")

    def _remove(self, site: str) -> None:
        """Take a site out of the job, and end a job without sites: :meth:`start` then starts another."""
        self.sites = self.sites - {site}
        if not self.sites:
            self.restart()

    def _disconnect(self, reason: str) -> None:
        """Close the connection of a job that has ended, or is about to."""
        bridge, self._bridge = self._bridge, None
        self.sites = frozenset()
        self._polled_at = 0.0
        if bridge is not None:
            bridge.close()
            self.note(f"job {self.job_number} is over: {reason}")
