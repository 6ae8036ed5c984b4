"""Clients in this process: one after the other, on one resident base model."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..methods.contract import Method, Task, Update
from . import wire
from .store import ClientStore


@dataclass(frozen=True)
class Reply:
    """What came back from one client: an update, or the reason why there is none.

    ``bytes_down`` and ``bytes_up`` are the lengths of task and update on the wire, ``seconds`` the client's
    work.
    """

    client: str
    update: Update | None
    reason: str
    detail: str
    bytes_down: int
    bytes_up: int
    seconds: float


class InProcess:
    """Asks clients that live in this process. Bytes are counted as on a network, but not copied."""

    def __init__(self, method: Method, store: ClientStore) -> None:
        self.method = method
        self.store = store

    def exchange(self, tasks: Mapping[str, Task], label: str) -> Iterator[Reply]:
        """Give each client its task and yield the replies as they come; a client's failure is a reply, not
        an error.
        """
        for name, task in tasks.items():
            down = wire.length(task.tensors, {"kind": task.kind, **task.values})
            up, update, reason, detail = 0, None, "", ""
            started = time.perf_counter()
            client = self.store.open(name)
            try:
                answer = self.method.work(task, client)
                up = wire.length(answer.tensors, {"weight": answer.weight, **answer.values})
                self.method.check(task, answer)
                update = answer
            except Exception as error:  # whatever a client does wrong, the others go on
                lines = str(error).strip().splitlines()
                reason = lines[0] if lines else type(error).__name__
                detail = traceback.format_exc()
            if update is not None:  # what a client did in vain, it forgets
                self.store.close(client, label)
            yield Reply(name, update, reason, detail, down, up, time.perf_counter() - started)
