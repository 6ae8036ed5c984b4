"""The run's end of the engine: a chain of jobs, seen as one connection to the sites."""

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
from .jobs import ENDED, Session

START = 60.0
"""Seconds that a job may take to start before it is given up and another is submitted."""

SETTLE = 8.0
"""Seconds that a new job waits for sites that are expected."""

LOOK = 1.5
"""Seconds between looks at which sites are connected."""


@dataclass(frozen=True)
class ReceivedMessage:
    """What a site said to one message: a head and a file of tensors, or that nothing will come (``lost``)."""

    number: int
    site: str
    head: dict[str, Any]
    body: Path | None
    lost: str


class Link:
    """Messages to sites and back, through one job after another.

    A job that ends for whatever reason is followed by another with the sites that are there; what was under
    way is then to be sent again (:attr:`epoch` has changed). ``note`` is told what happens. Whoever keeps the
    engine alive says in ``given_up`` why it cannot.
    """

    def __init__(self, kit: Path, door: BridgeListener, note: Callable[[str], None]) -> None:
        self.session, self.note, self.door = Session(kit), note, door
        self.sites: frozenset[str] = frozenset()
        self.epoch = 0
        self.given_up = ""
        self._bridge: Bridge | None = None
        self._job = ""
        self._events: queue.Queue[tuple[Bridge, dict[str, Any] | None]] = queue.Queue()
        self._numbers = itertools.count()
        self._looked, self._seen = 0.0, frozenset[str]()
        threading.Thread(target=self._accept, daemon=True).start()

    def connected(self) -> frozenset[str]:
        """The sites that the server has heard of lately, in a job or not; none while the server is away."""
        if time.monotonic() - self._looked > LOOK:
            try:
                self._seen = frozenset(self.session.connected())
            except DeploymentError:
                self._seen = frozenset()
            self._looked = time.monotonic()
        return self._seen

    def start(self, wanted: Collection[str], until: float) -> None:
        """Have a job running, with all sites that are connected; those that are ``wanted`` are given a moment
        to come first.

        Raises:
            DeploymentError: by ``until`` (:func:`time.monotonic`) there is none.
        """
        reason, settled = "no site is connected", time.monotonic() + SETTLE
        while self._bridge is None:
            now = time.monotonic()
            if self.given_up:
                raise DeploymentError(self.given_up)
            if now > until:
                raise DeploymentError(f"no job could be started: {reason}")
            sites = sorted(self.connected())
            if not sites or (now < settled and not set(wanted) <= set(sites)):
                time.sleep(0.3)
                continue
            try:
                self._job = self.session.submit(sites)
                reason = self._wait_for_controller(min(until, time.monotonic() + START))
            except DeploymentError as error:
                reason = str(error)
                time.sleep(1.0)

    def restart(self) -> None:
        """End the job; the next one has the sites that are connected then."""
        if self._bridge is not None:
            with contextlib.suppress(BridgeError):
                self._bridge.send({"kind": "end"})
        self._lose("a new job follows")

    def send(self, site: str, head: str, body: Path | None, to: Path, most: int) -> int:
        """Send a message; the answer's tensors are to be written to ``to``. Returns the message's number."""
        number = next(self._numbers)
        message = {"kind": "send", "number": number, "site": site, "head": head, "to": str(to), "most": most}
        try:
            assert self._bridge is not None
            self._bridge.send(message | {"body": str(body) if body else None})
        except BridgeError as error:
            self._lose(str(error))
        return number

    def cancel(self, number: int) -> None:
        """Wait no longer for the answer to a message."""
        if self._bridge is not None:
            with contextlib.suppress(BridgeError):
                self._bridge.send({"kind": "cancel", "number": number})

    def receive(self, timeout: float) -> ReceivedMessage | None:
        """The next answer, if one comes in time; a site that is gone leaves :attr:`sites`."""
        try:
            bridge, message = self._events.get(timeout=timeout)
        except queue.Empty:
            return None
        if bridge is not self._bridge:
            if message is not None and message.get("kind") == "ready":
                if self._bridge is None:
                    self._adopt(bridge, message)
                else:  # a job that was given up, and came all the same
                    bridge.close()
            return None
        if message is None:
            self._lose("its connection broke")
            return None
        body = message.get("body")
        lost = str(message.get("lost", ""))
        if lost:
            self.sites = self.sites - {str(message["site"])}
        return ReceivedMessage(
            int(message["number"]), str(message["site"]), message.get("head") or {},
            Path(body) if body else None, lost,
        )  # fmt: skip

    def close(self) -> None:
        """End the job and everything that belongs to this end."""
        self.restart()
        if self._job:
            self._wait_for_end(time.monotonic() + 15.0)
        self.session.close()
        self.door.close()

    def _accept(self) -> None:
        while True:
            try:
                bridge = self.door.accept()
            except BridgeError:
                return
            threading.Thread(target=self._listen, args=(bridge,), daemon=True).start()

    def _listen(self, bridge: Bridge) -> None:
        with contextlib.suppress(BridgeError):
            while True:
                self._events.put((bridge, bridge.receive()))
        self._events.put((bridge, None))

    def _wait_for_controller(self, until: float) -> str:
        """Wait until the submitted job's controller is there; the reason if it does not come."""
        asked = time.monotonic()
        while time.monotonic() < until:
            self.receive(timeout=0.2)
            if self._bridge is not None:
                return ""
            if time.monotonic() - asked > 2.0:
                asked = time.monotonic()
                status = self.session.status(self._job)
                if status.startswith(ENDED):
                    return f"the engine ended the job: {status.removeprefix(ENDED).strip(':')}"
        self.session.abort(self._job)
        return "the engine did not start the job in time"

    def _wait_for_end(self, until: float) -> None:
        with contextlib.suppress(DeploymentError):
            while time.monotonic() < until:
                if self.session.status(self._job).startswith(ENDED):
                    return
                time.sleep(0.5)
            self.session.abort(self._job)

    def _adopt(self, bridge: Bridge, ready: dict[str, Any]) -> None:
        self._bridge, self.sites = bridge, frozenset(map(str, ready["sites"]))
        self.process = int(ready["process"])
        self.epoch += 1
        self.note(f"job {self.epoch} with {', '.join(sorted(self.sites))}")

    def _lose(self, reason: str) -> None:
        bridge, self._bridge = self._bridge, None
        self.sites = frozenset()
        self._looked = 0.0
        if bridge is not None:
            bridge.close()
            self.note(f"job {self.epoch} is over: {reason}")
