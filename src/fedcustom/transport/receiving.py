"""The server's end of clients' answers: transforms, checks, and what a client remembers."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Container, Mapping, Sequence
from typing import NamedTuple

from ..methods.messages import Task, Update
from ..methods.protocol import Asked, Client, Method
from ..updates.pipeline import on_client, on_server
from ..updates.transform import ClientContext, JointTransform, UpdateTransform
from .channel import task_length, update_length
from .client_store import ClientStore
from .protocol import Reply

SLOW = 10
"""Seconds from which on it is worth saying how long a client took outside rounds."""


class ClientFailure(Exception):
    """Why a client in another process gave no update, in one line, with the traceback of that process."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.detail = detail


class Worked(NamedTuple):
    """A client after its work, its answer, and the seconds that it took."""

    client: Client
    answer: Update | Exception
    seconds: float


class Receiver:
    """Makes replies of what simulated clients answered, wherever they worked. ``transforms`` act on the
    updates on their way. A client remembers what it did in a round if its answer is sound.
    """

    def __init__(
        self,
        method: Method,
        store: ClientStore,
        transforms: Sequence[UpdateTransform] = (),
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.method, self.store, self.transforms, self.note = method, store, transforms, note
        self.joint = next((one for one in transforms if isinstance(one, JointTransform)), None)

    def first(self, tasks: Mapping[str, Task], absent: Container[str]) -> list[str]:
        """Those whose updates are transformed together, who therefore work before the round's others."""
        if self.joint is None:
            return []
        return [name for name in tasks if name in self.joint.members and name not in absent]

    def agreed(self, worked: Mapping[str, Worked], cohort: int) -> dict[str, Worked]:
        """What came of the work of those, with the answers that they agreed on; ``cohort`` is the number of
        clients in the round.
        """
        updates = {name: one.answer for name, one in worked.items() if isinstance(one.answer, Update)}
        given = self.joint.on_clients(updates, cohort) if updates and self.joint is not None else {}
        return {name: one._replace(answer=given.get(name, one.answer)) for name, one in worked.items()}

    def reply(self, name: str, task: Task, down: int, round_number: int, worked: Worked) -> Reply:
        """A client's answer as the server gets it, checked. ``task`` is as the client got it, ``down`` the
        length of its message in bytes.
        """
        started = time.perf_counter()
        up, update, reason, detail = 0, None, "", ""
        try:
            if isinstance(worked.answer, Exception):
                raise worked.answer
            context = ClientContext(name, task, worked.client.memory)
            sent = on_client(self.transforms, worked.answer, context)
            received, up = on_server(self.transforms, sent, context), update_length(sent)
            self.method.check(task, received)
            update = received
        except Exception as error:
            reason = _reason(error)
            detail = error.detail if isinstance(error, ClientFailure) else traceback.format_exc()
        if update is not None:  # what a client did in vain, it forgets
            self.store.close(worked.client, round_number)
        seconds = worked.seconds + time.perf_counter() - started
        return Reply(name, task, update, reason, detail, down, up, seconds)

    def asked(self, name: str, task: Task, answer: Update | Exception, seconds: float) -> Asked | None:
        """The sound answer to a task outside rounds; None where there is none, and why is noted. What the
        client remembers of it is not kept.
        """
        try:
            if isinstance(answer, Exception):
                raise answer
            self.method.check(task, answer)
        except Exception as error:  # whatever a client does wrong, the others go on
            self.note(f"client {name} left out: {_reason(error)}")
            return None
        if seconds > SLOW:
            self.note(f"client {name}: {task.kind} done in {seconds:.0f} s")
        return Asked(answer, task_length(task), update_length(answer))


def shared_out(seconds: float, clients: Sequence[Client]) -> list[float]:
    """The seconds of each client of a shared batch, by its number of examples."""
    sizes = [1 + len(client.data.train) for client in clients]
    return [seconds * size / sum(sizes) for size in sizes]


def work_of(method: Method, pairs: Sequence[tuple[Task, Client]]) -> list[Update | Exception]:
    """The answers of clients in this process, in one batch where they are several, or the errors that they
    met.
    """
    if len(pairs) != 1:
        return method.execute_together(pairs) if pairs else []
    try:
        return [method.execute(*pairs[0])]
    except Exception as error:  # whatever a client does wrong, the others go on
        return [error]


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
