"""Clients in this process: one after the other, on one resident base model."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass

from ..methods.contract import Client, Method, Task, Update
from .channel import Channel
from .store import ClientStore


@dataclass(frozen=True)
class Reply:
    """What came back from one client: an update, or the reason why there is none.

    ``task`` and ``update`` are as they came out of the channel. ``bytes_down`` and ``bytes_up`` are the
    lengths of their messages, ``seconds`` the client's work.
    """

    client: str
    task: Task
    update: Update | None
    reason: str
    detail: str
    bytes_down: int
    bytes_up: int
    seconds: float


class InProcess:
    """Asks clients that live in this process. Bytes are counted as on a network, but not copied."""

    def __init__(
        self,
        method: Method,
        store: ClientStore,
        channel: Channel,
        work: Callable[[Task, Client], Update] | None = None,
    ) -> None:
        self.method, self.store, self.channel = method, store, channel
        self.work = work or method.work

    def exchange(self, tasks: Mapping[str, Task], label: str, absent: Container[str] = ()) -> Iterator[Reply]:
        """Give each client its task and yield the replies as they come; a client's failure is a reply, not
        an error. Clients in ``absent`` take their task and never answer.
        """
        for name, sent in tasks.items():
            task, down = self.channel.down(sent)
            if name in absent:
                yield Reply(name, task, None, "dropped out", "", down, 0, 0.0)
                continue
            up, update, reason, detail = 0, None, "", ""
            started = time.perf_counter()
            client = self.store.open(name)
            try:
                answer, up = self.channel.up(self.work(task, client), client.memory)
                self.method.check(task, answer)
                update = answer
            except Exception as error:  # whatever a client does wrong, the others go on
                lines = str(error).strip().splitlines()
                reason = lines[0] if lines else type(error).__name__
                detail = traceback.format_exc()
            if update is not None:  # what a client did in vain, it forgets
                self.store.close(client, label)
            seconds = time.perf_counter() - started
            yield Reply(name, task, update, reason, detail, down, up, seconds)
