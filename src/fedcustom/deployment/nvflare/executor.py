"""At a site, in the engine's job process: hands each message to the resident process, and its answer back."""

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

from . import carry
from .bridge import ADDRESS_VARIABLE, Bridge, BridgeError, connect

RESTART = 60.0
"""Seconds that a resident process may need to come back."""

MOST_BYTES = 64 * 2**30

LEFT_OVER = 24 * 3600.0
"""Seconds after which a message in passing belongs to no job any more."""


class SiteExecutor(Executor):  # type: ignore[misc]
    """Answers any task with what the site's resident process says; keeps nothing itself."""

    def __init__(self) -> None:
        super().__init__()
        self._spool = Path(os.environ.get(ADDRESS_VARIABLE, ".")).parent / "spool" / "passing"
        self._sent: list[Path] = []

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """The engine's events; the folder for messages in passing is made when a job starts."""
        if event_type == EventType.START_RUN:
            self._spool.mkdir(parents=True, exist_ok=True)
            for left in self._spool.glob("*.in"):  # by a job that was killed
                if time.time() - left.stat().st_mtime > LEFT_OVER:
                    left.unlink(missing_ok=True)

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        """One message to the resident process and its answer."""
        cell = fl_ctx.get_engine().get_cell()
        body = self._spool / f"{uuid.uuid4().hex}.in"
        message = json.loads(shareable["head"])
        if error := carry.take(shareable, body, cell, MOST_BYTES, abort_signal):
            return self._reply({"error": error}, None, cell)
        answer: dict[str, Any] | None = None
        try:
            message["body"] = str(body) if body.exists() else None
            answer = self._ask(message, abort_signal)
        finally:
            body.unlink(missing_ok=True)
        if answer is None:
            return make_reply(ReturnCode.TASK_ABORTED)
        path = answer.pop("body", None)
        return self._reply(answer, Path(path) if path else None, cell)

    def _reply(self, answer: dict[str, Any], body: Path | None, cell: Any) -> Shareable:
        for path in self._sent:  # the server asks anew only after it has what was sent before
            path.unlink(missing_ok=True)
        self._sent = [body] if body else []
        reply = make_reply(ReturnCode.OK)
        reply["head"] = json.dumps(answer)
        carry.put(reply, body, cell)
        return reply

    def _ask(self, message: dict[str, Any], abort_signal: Signal) -> dict[str, Any] | None:
        """The resident process' answer; None if the job ends first. A process that died meanwhile is asked
        again when it is back.
        """
        until = time.monotonic() + RESTART
        bridge: Bridge | None = None
        while not abort_signal.triggered:
            try:
                if bridge is None:
                    bridge = connect()
                    bridge.send(message)
                    until = time.monotonic() + RESTART
                answer = bridge.receive(timeout=0.5)
            except BridgeError:
                if bridge is not None:  # it was there until now
                    until = time.monotonic() + RESTART
                    bridge.close()
                bridge = None
                if time.monotonic() > until:
                    return {"error": "the site's resident process is not running"}
                time.sleep(0.5)
                continue
            if answer is not None:
                bridge.close()
                return answer
        return None
