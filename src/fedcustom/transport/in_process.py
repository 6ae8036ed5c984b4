"""In-process transport: clients in this process, on one resident base model."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Container, Iterator, Mapping, Sequence

from ..methods.protocol import Asked, AsksClients, Client, Method, Task, Update
from ..updates.pipeline import on_client, on_server
from ..updates.transform import ClientContext, JointTransform, UpdateTransform
from .channel import Channel, task_length, update_length
from .client_store import ClientStore
from .protocol import Reply

SLOW = 10
"""Seconds from which on it is worth saying how long a client took outside rounds."""


class InProcessTransport:
    """Asks clients that live in this process, many at once where the method trains them in one batch. Bytes
    are counted as on a network, but not copied. ``transforms`` act on the updates on their way.
    """

    def __init__(
        self,
        method: Method,
        store: ClientStore,
        channel: Channel,
        transforms: Sequence[UpdateTransform] = (),
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.method, self.store, self.channel, self.transforms = method, store, channel, transforms
        self.note = note
        self.joint = next((one for one in transforms if isinstance(one, JointTransform)), None)
        if isinstance(method, AsksClients):
            method.connect(self.ask, list(store.data))

    def exchange(
        self, tasks: Mapping[str, Task], round_number: int, absent: Container[str] = ()
    ) -> Iterator[Reply]:
        """Give each client its task and yield the replies as they come, in the tasks' order; a client's
        failure is a reply, not an error. Clients in ``absent`` take their task and never answer.
        """
        width = self.method.widest_cohort()
        names = list(tasks)
        ahead = self._together(tasks, absent)
        for start in range(0, len(names), width):
            cohort = names[start : start + width]
            sent = {name: self.channel.down(tasks[name]) for name in cohort}
            present = [name for name in cohort if name not in absent and name not in ahead]
            answers = dict(zip(present, self._work({name: sent[name][0] for name in present}), strict=True))
            answers |= {name: ahead[name] for name in cohort if name in ahead}
            for name in cohort:
                task, down = sent[name]
                if name in absent:
                    yield Reply(name, task, None, "dropped out", "", down, 0, 0.0)
                else:
                    yield self._reply(name, task, down, round_number, *answers.pop(name))

    def _together(
        self, tasks: Mapping[str, Task], absent: Container[str]
    ) -> dict[str, tuple[Client, Update | Exception, float]]:
        """The answers of those whose updates are transformed together, who therefore work first."""
        if self.joint is None:
            return {}
        names = [name for name in tasks if name in self.joint.members and name not in absent]
        found: dict[str, tuple[Client, Update | Exception, float]] = {}
        width = self.method.widest_cohort()
        for start in range(0, len(names), width):
            cohort = names[start : start + width]
            worked = self._work({name: self.channel.down(tasks[name])[0] for name in cohort})
            found |= zip(cohort, worked, strict=True)
        updates = {name: answer for name, (_, answer, _) in found.items() if isinstance(answer, Update)}
        agreed = self.joint.on_clients(updates, len(tasks)) if updates else {}
        return {
            name: (client, agreed.get(name, answer), seconds)
            for name, (client, answer, seconds) in found.items()
        }

    def ask(self, tasks: Mapping[str, Task]) -> dict[str, Asked]:
        """The sound answers to tasks outside rounds; why others gave none is handed to ``note``. What clients
        remember of them is not kept.
        """
        answers = {}
        for name, task in tasks.items():
            started = time.perf_counter()
            try:
                update = self.method.execute(task, self.store.open(name))
                self.method.check(task, update)
            except Exception as error:  # whatever a client does wrong, the others go on
                lines = str(error).strip().splitlines()
                self.note(f"client {name} left out: {lines[0] if lines else type(error).__name__}")
                continue
            if (seconds := time.perf_counter() - started) > SLOW:
                self.note(f"client {name}: {task.kind} done in {seconds:.0f} s")
            answers[name] = Asked(update, task_length(task), update_length(update))
        return answers

    def _work(self, tasks: Mapping[str, Task]) -> Iterator[tuple[Client, Update | Exception, float]]:
        """Each client after its work, its answer, and the seconds that it took (its part of a shared batch
        by its number of examples).
        """
        pairs = [(task, self.store.open(name)) for name, task in tasks.items()]
        if not pairs:
            return
        started = time.perf_counter()
        answers: list[Update | Exception]
        if len(pairs) == 1:
            try:
                answers = [self.method.execute(*pairs[0])]
            except Exception as error:  # whatever a client does wrong, the others go on
                answers = [error]
        else:
            answers = self.method.execute_together(pairs)
        seconds = time.perf_counter() - started
        sizes = [1 + len(client.data.train) for _, client in pairs]
        for (_, client), answer, size in zip(pairs, answers, sizes, strict=True):
            yield client, answer, seconds * size / sum(sizes)

    def _reply(
        self,
        name: str,
        task: Task,
        down: int,
        round_number: int,
        client: Client,
        answer: Update | Exception,
        seconds: float,
    ) -> Reply:
        """A client's answer as the server gets it, checked."""
        started = time.perf_counter()
        up, update, reason, detail = 0, None, "", ""
        try:
            if isinstance(answer, Exception):
                raise answer
            context = ClientContext(name, task, client.memory)
            sent = on_client(self.transforms, answer, context)
            received, up = on_server(self.transforms, sent, context), update_length(sent)
            self.method.check(task, received)
            update = received
        except Exception as error:
            lines = str(error).strip().splitlines()
            reason = lines[0] if lines else type(error).__name__
            detail = traceback.format_exc()
        if update is not None:  # what a client did in vain, it forgets
            self.store.close(client, round_number)
        return Reply(name, task, update, reason, detail, down, up, seconds + time.perf_counter() - started)
