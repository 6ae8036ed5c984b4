"""At the server, in the engine's job process: hands the run's messages to sites, and their answers back."""

from __future__ import annotations

import json
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
from . import carry
from .bridge import Bridge, BridgeError, connect

MOST_HEAD = 16 * 2**20
"""Characters of an answer's head: its numbers and texts."""


class ServerController(Controller):  # type: ignore[misc]
    """Relays messages between the run's own process and the sites; the run's process decides everything."""

    def __init__(self) -> None:
        super().__init__(task_check_period=0.02)
        self._open: dict[int, Task] = {}
        self._bridge: Bridge | None = None

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Nothing to prepare."""

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Close the connection to the run's process."""
        if self._bridge is not None:
            self._bridge.close()

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Pass messages on until the run's process says that it is done, or goes away."""
        engine = fl_ctx.get_engine()
        try:
            self._bridge = connect()
            sites = [client.name for client in engine.get_clients()]
            self._bridge.send({"kind": "ready", "sites": sites, "process": os.getpid()})
            while not abort_signal.triggered:
                message = self._bridge.receive(timeout=0.5)
                if message is None:
                    continue
                if message["kind"] == "end":
                    break
                if message["kind"] == "cancel":
                    if task := self._open.pop(message["number"], None):
                        self.cancel_task(task)
                else:
                    self._pass_on(message, fl_ctx, abort_signal)
        except BridgeError as error:
            self.log_info(fl_ctx, f"the run's process has gone: {error}")

    def process_result_of_unknown_task(
        self, client: Client, task_name: str, client_task_id: str, result: Shareable, fl_ctx: FLContext
    ) -> None:
        """Answers that nobody waits for any more are dropped."""

    def _pass_on(self, message: dict[str, Any], fl_ctx: FLContext, abort_signal: Signal) -> None:
        number, target, most = int(message["number"]), str(message["site"]), int(message["most"])
        cell = fl_ctx.get_engine().get_cell()
        data = Shareable()
        data["head"] = message["head"]
        body = message.get("body")
        carry.put(data, Path(body) if body else None, cell)

        def received(client_task: ClientTask, fl_ctx: FLContext) -> None:
            # A large answer is fetched apart, so that other sites' answers need not wait for it.
            result, client_task.result = client_task.result, None
            threading.Thread(target=deliver, args=(result,), daemon=True).start()

        def deliver(result: Any) -> None:
            self._open.pop(number, None)
            answer: dict[str, Any] = {"kind": "answer", "number": number, "site": target}
            try:
                if result is None or result.get_return_code() != "OK":
                    code = "no answer" if result is None else result.get_return_code()
                    self._answer(answer | {"lost": str(code)})
                    return
                to = Path(message["to"])
                error = carry.take(result, to, cell, most, abort_signal)
                head = {"error": error} if error else read_head(result["head"])
                self._answer(answer | {"head": head, "body": str(to) if to.exists() else None})
            except Exception as error:  # nothing that a site sends may end the job
                self._answer(answer | {"head": {"error": f"not a message ({type(error).__name__})"}})
            if body:
                release_freed_memory()  # the engine's messages refer to one another

        def done(task: Task, fl_ctx: FLContext) -> None:
            if self._open.pop(number, None) is None or task.completion_status == TaskCompletionStatus.OK:
                return
            self._answer(
                {"kind": "answer", "number": number, "site": target, "lost": str(task.completion_status)}
            )

        task = Task(name="fedcustom", data=data, timeout=0, result_received_cb=received, task_done_cb=done)
        self._open[number] = task
        self.send(task, fl_ctx, targets=[target], send_order=SendOrder.SEQUENTIAL)

    def _answer(self, message: dict[str, Any]) -> None:
        assert self._bridge is not None
        try:
            self._bridge.send(message)
        except BridgeError:
            self._open.clear()  # the run's process will send its messages again


def read_head(text: Any) -> dict[str, Any]:
    """The head of a site's answer.

    Raises:
        ValueError: it is none, or too large for the run's process.
    """
    if not isinstance(text, str) or len(text) > MOST_HEAD:
        raise ValueError("not a head")
    head = json.loads(text)
    if not isinstance(head, dict):
        raise ValueError("not a head")
    return head
