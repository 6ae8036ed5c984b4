"""In-process transport: clients in this process, on one resident base model."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence

from ..methods.messages import Task
from ..methods.protocol import Asked, AsksClients, Method
from ..updates.transform import UpdateTransform
from .channel import Channel
from .client_store import ClientStore
from .protocol import Reply
from .receiving import Receiver, Worked, shared_out, work_of


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
        self.method, self.store, self.channel = method, store, channel
        self.receiver = Receiver(method, store, transforms, note)
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
                    yield self.receiver.reply(name, task, down, round_number, answers.pop(name))

    def _together(self, tasks: Mapping[str, Task], absent: Container[str]) -> dict[str, Worked]:
        """What came of those whose updates are transformed together, who therefore work first."""
        names = self.receiver.first(tasks, absent)
        found: dict[str, Worked] = {}
        width = self.method.widest_cohort() if names else 1
        for start in range(0, len(names), width):
            cohort = names[start : start + width]
            worked = self._work({name: self.channel.down(tasks[name])[0] for name in cohort})
            found |= zip(cohort, worked, strict=True)
        return self.receiver.agreed(found, len(tasks))

    def ask(self, tasks: Mapping[str, Task]) -> dict[str, Asked]:
        """The sound answers to tasks outside rounds; why others gave none is handed to ``note``. What clients
        remember of them is not kept.
        """
        answers = {}
        for name, task in tasks.items():
            (worked,) = self._work({name: task})
            asked = self.receiver.asked(name, task, worked.answer, worked.seconds)
            if asked is not None:
                answers[name] = asked
        return answers

    def _work(self, tasks: Mapping[str, Task]) -> Iterator[Worked]:
        """What came of each client's work (its seconds: its part of those of a shared batch)."""
        pairs = [(task, self.store.open(name)) for name, task in tasks.items()]
        started = time.perf_counter()
        answers = work_of(self.method, pairs)
        clients = [client for _, client in pairs]
        seconds = shared_out(time.perf_counter() - started, clients)
        for client, answer, own in zip(clients, answers, seconds, strict=True):
            yield Worked(client, answer, own)
