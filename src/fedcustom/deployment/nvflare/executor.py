"""Executor of the engine's job at a site: relays each request to the resident process, and its reply back."""

from __future__ import annotations

import json
import os
import time
import uuid
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from .bridge import ADDRESS_VARIABLE, Bridge, BridgeError, connect
from .payload import attach_payload, receive_payload

RESTART_TIMEOUT = 60.0
"""Seconds that a resident process may take to restart."""

MAX_BYTES = 64 * 2**30

STALE_AFTER = 24 * 3600.0
"""Seconds after which a file of tensors in the spool folder belongs to no job any more."""


class SiteExecutor(Executor):  # type: ignore[misc]
    """Relay between the engine and the site's resident process; stateless but for files to be removed."""

    def __init__(self) -> None:
        super().__init__()
        self._spool = Path(os.environ.get(ADDRESS_VARIABLE, ".")).parent / "spool" / "passing"
        self._sent: list[Path] = []

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """When a job starts, create the spool folder and remove what killed jobs left in it."""
        if event_type == EventType.START_RUN:
            self._spool.mkdir(parents=True, exist_ok=True)
            for stale in self._spool.glob("*.in"):
                if time.time() - stale.stat().st_mtime > STALE_AFTER:
                    stale.unlink(missing_ok=True)

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        """Have the resident process answer one request."""
        cell = fl_ctx.get_engine().get_cell()
        body = self._spool / f"{uuid.uuid4().hex}.in"
        message = json.loads(shareable["head"])
        if error := receive_payload(shareable, body, cell, MAX_BYTES, abort_signal):
            return self._pack_reply({"error": error}, None, cell)
        reply: dict[str, Any] | None = None
        try:
            message["body"] = str(body) if body.exists() else None
            reply = self._ask_resident(message, abort_signal)
        finally:
            body.unlink(missing_ok=True)
        if reply is None:
            return make_reply(ReturnCode.TASK_ABORTED)
        path = reply.pop("body", None)
        return self._pack_reply(reply, Path(path) if path else None, cell)

    def _pack_reply(self, reply: dict[str, Any], body: Path | None, cell: Any) -> Shareable:
        for path in self._sent:  # the server sends another request only after it has the previous reply
            path.unlink(missing_ok=True)
        self._sent = [body] if body else []
        message = make_reply(ReturnCode.OK)
        message["head"] = json.dumps(reply)
        attach_payload(message, body, cell)
        return message

    def _ask_resident(self, message: dict[str, Any], abort_signal: Signal) -> dict[str, Any] | None:
        """The resident process' reply; None if the job ends first. A process that died meanwhile is asked
        again after its restart.
        """
        deadline = time.monotonic() + RESTART_TIMEOUT
        bridge: Bridge | None = None
        while not abort_signal.triggered:
            try:
                if bridge is None:
                    bridge = connect()
                    bridge.send(message)
                    deadline = time.monotonic() + RESTART_TIMEOUT
                reply = bridge.receive(timeout=0.5)
            except BridgeError:
                if bridge is not None:  # it has just died
                    deadline = time.monotonic() + RESTART_TIMEOUT
                    bridge.close()
                bridge = None
                if time.monotonic() > deadline:
                    return {"error": "the site's resident process is not running"}
                time.sleep(0.5)
                continue
            if reply is not None:
                bridge.close()
                return reply
        return None
