"""Controller of the engine's job at the server: relays requests to sites, and their replies."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from nvflare.apis.client import Client
from nvflare.apis.controller_spec import ClientTask, SendOrder, Task, TaskCompletionStatus
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal

from ...core.allocator import release_freed_memory
from ...core.bounded_json import read_json
from ...core.errors import WireError
from ...core.text import printable
from .bridge import Bridge, BridgeError, connect
from .housekeeping import Housekeeping
from .payload import attach_payload, receive_payload
from .streams import share_stream_timers

MAX_HEAD_LENGTH = 16 * 2**20
"""Largest head of a reply (its numbers and texts), in characters."""


class ServerController(Controller):  # type: ignore[misc]
    """Relay between the run's own process, which decides everything, and the sites."""

    def __init__(self) -> None:
        super().__init__(task_check_period=0.02)
        self._pending: dict[int, Task] = {}
        self._bridge: Bridge | None = None
        self._housekeeping: Housekeeping | None = None

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Bound threads, logs and the folders of earlier jobs."""
        if not share_stream_timers():
            self.log_warning(fl_ctx, "this version of the engine has a thread for each stream received")
        root = fl_ctx.get_engine().get_workspace().root_dir
        self._housekeeping = Housekeeping(Path(root), fl_ctx.get_job_id())

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Close the connection to the run's process."""
        if self._bridge is not None:
            self._bridge.close()

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Relay messages until the run's process says that it is done, or disconnects."""
        engine = fl_ctx.get_engine()
        try:
            self._bridge = connect()
            sites = [client.name for client in engine.get_clients()]
            self._bridge.send({"kind": "ready", "sites": sites, "process": os.getpid()})
            while not abort_signal.triggered:
                if self._housekeeping is not None:
                    self._housekeeping.tidy()
                message = self._bridge.receive(timeout=0.5)
                if message is None:
                    continue
                if message["kind"] == "end":
                    break
                if message["kind"] == "cancel":
                    if task := self._pending.pop(message["number"], None):
                        self.cancel_task(task)
                else:
                    self._forward(message, fl_ctx, abort_signal)
        except BridgeError as error:
            self.log_info(fl_ctx, f"the run's process has gone: {error}")

    def process_result_of_unknown_task(
        self, client: Client, task_name: str, client_task_id: str, result: Shareable, fl_ctx: FLContext
    ) -> None:
        """Drop a reply that nobody waits for any more."""

    def _forward(self, message: dict[str, Any], fl_ctx: FLContext, abort_signal: Signal) -> None:
        number, site, max_bytes = int(message["number"]), str(message["site"]), int(message["most"])
        cell = fl_ctx.get_engine().get_cell()
        data = Shareable()
        data["head"] = message["head"]
        body = message.get("body")
        attach_payload(data, Path(body) if body else None, cell)

        def received(client_task: ClientTask, fl_ctx: FLContext) -> None:
            # A large reply is fetched in a thread of its own, so that those of other sites need not wait.
            result, client_task.result = client_task.result, None
            threading.Thread(target=deliver, args=(result,), daemon=True).start()

        def deliver(result: Any) -> None:
            self._pending.pop(number, None)
            reply: dict[str, Any] = {"kind": "answer", "number": number, "site": site}
            try:
                if result is None or result.get_return_code() != "OK":
                    code = "no answer" if result is None else result.get_return_code()
                    self._send_reply(reply | {"lost": printable(str(code), lines=False, longest=200)})
                    return
                path = Path(message["to"])
                error = receive_payload(result, path, cell, max_bytes, abort_signal)
                head = {"error": error} if error else read_json(result["head"], MAX_HEAD_LENGTH)
                self._send_reply(reply | {"head": head, "body": str(path) if path.exists() else None})
            except WireError as error:
                self._send_reply(reply | {"head": {"error": str(error)}})
            except Exception as error:  # nothing that a site sends may end the job
                self._send_reply(reply | {"head": {"error": f"not a message ({type(error).__name__})"}})
            if body:
                release_freed_memory()  # the engine's messages refer to one another

        def done(task: Task, fl_ctx: FLContext) -> None:
            if self._pending.pop(number, None) is None or task.completion_status == TaskCompletionStatus.OK:
                return
            self._send_reply(
                {"kind": "answer", "number": number, "site": site, "lost": str(task.completion_status)}
            )

        task = Task(name="fedcustom", data=data, timeout=0, result_received_cb=received, task_done_cb=done)
        self._pending[number] = task
        self.send(task, fl_ctx, targets=[site], send_order=SendOrder.SEQUENTIAL)

    def _send_reply(self, message: dict[str, Any]) -> None:
        assert self._bridge is not None
        try:
            self._bridge.send(message)
        except BridgeError:
            self._pending.clear()  # the run's process will send its requests again
