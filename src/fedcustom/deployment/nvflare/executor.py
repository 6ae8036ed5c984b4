"""Executor of the engine's job at a site: relays each request to the resident process, and its reply back."""

from __future__ import annotations

import contextlib
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

from ...core.bounded_json import read_json, write_json
from ...core.errors import WireError
from .bridge import ADDRESS_VARIABLE, LIMIT_VARIABLE, Bridge, BridgeError, connect
from .housekeeping import Housekeeping
from .payload import attach_payload, receive_payload
from .streams import share_stream_timers

RESTART_TIMEOUT = 300.0
"""Seconds that a resident process may take to restart; on a busy machine it loads its base model for a
minute or more. The round has a deadline of its own.
"""

MAX_BYTES = 8 * 10**9
"""Largest request, in bytes, where the site's policy (``max_request_gigabytes``) is not handed on."""

STALE_AFTER = 600.0
"""Seconds after which the resident process has no use any more for tensors that a job now dead handed to
it.
"""


class SiteExecutor(Executor):  # type: ignore[misc]
    """Relay between the engine and the site's resident process; stateless but for files to be removed."""

    def __init__(self) -> None:
        super().__init__()
        self._spool = Path(os.environ.get(ADDRESS_VARIABLE, ".")).parent / "spool" / "passing"
        self._max_bytes = int(os.environ.get(LIMIT_VARIABLE, MAX_BYTES))
        self._sent: list[Path] = []
        self._housekeeping: Housekeeping | None = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """When a job starts, bound threads, logs and the folders of earlier jobs, and remove what killed
        jobs left in the spool folder.
        """
        if event_type == EventType.START_RUN:
            if not share_stream_timers():
                self.log_warning(fl_ctx, "this version of the engine has a thread for each stream received")
            root = fl_ctx.get_engine().get_workspace().root_dir
            self._housekeeping = Housekeeping(Path(root), fl_ctx.get_job_id())
            self._spool.mkdir(parents=True, exist_ok=True)
            remove_stale(self._spool)

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        """Have the resident process answer one request."""
        if self._housekeeping is not None:
            self._housekeeping.tidy()
        cell = fl_ctx.get_engine().get_cell()
        body = self._spool / f"{os.getpid()}-{uuid.uuid4().hex}.in"
        try:
            message = read_json(shareable["head"])
        except WireError as error:
            return self._pack_reply({"error": str(error)}, None, cell)
        if reason := receive_payload(shareable, body, cell, self._max_bytes, abort_signal):
            return self._pack_reply({"error": reason}, None, cell)
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
        message["head"] = write_json(reply)
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


def remove_stale(spool: Path) -> None:
    """Remove the files of jobs that are over from a site's spool folder: answers that nobody sends any more,
    and requests that were handed to the resident process long ago by a job's process that is dead.
    """
    for answer in spool.glob("*.out"):  # the resident process makes another for each job that asks
        answer.unlink(missing_ok=True)
    for request in spool.glob("*.in"):
        with contextlib.suppress(OSError):
            owner = request.name.partition("-")[0]
            alive = owner.isdigit() and Path("/proc", owner).exists()
            if not alive and time.time() - request.stat().st_mtime > STALE_AFTER:
                request.unlink(missing_ok=True)
