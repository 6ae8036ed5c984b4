"""The transport of a simulation whose clients work in resident processes."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Container, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ...core.errors import WireError
from ...core.tensors import Tensors
from ...data.examples import ClientData
from ...methods.messages import RoundTask, Task, TrainingTask, Update
from ...methods.protocol import Asked, AsksClients, Client, Method
from ...updates.transform import UpdateTransform
from ..channel import Channel
from ..client_store import ClientStore
from ..protocol import Reply
from ..receiving import ClientFailure, Receiver, Worked
from .messages import ClientAnswer, decode_answer, encode_memory, encode_request, seconds_of
from .pool import Call, WorkerPool

AHEAD = 2
"""Calls of a worker that are under way or wait to be received: it never waits for the server, and what it
answered does not pile up.
"""

KEPT = 8
"""Messages of tensors that are remembered, so that they are not made anew for each client."""


class WorkersTransport:
    """Asks clients that work in the processes of a pool, each worker its part of a cohort, in batches as wide
    as the method's. Here remain what clients remember, the transforms of updates, and all checks; a worker
    has the method, the base model and the data. Bytes are counted as on a network.

    What the server sees does not depend on which worker was faster: clients are shared out by their numbers
    of examples, and replies come in the order of the tasks.
    """

    def __init__(
        self,
        method: Method,
        store: ClientStore,
        channel: Channel,
        pool: WorkerPool,
        transforms: Sequence[UpdateTransform] = (),
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.method, self.store, self.channel, self.pool = method, store, channel, pool
        self.receiver = Receiver(method, store, transforms, note)
        self._numbers = itertools.count()
        self._round: int | None = None
        self._places: dict[str, int] = {}
        self._messages: OrderedDict[tuple[tuple[str, int], ...], tuple[Tensors, Any]] = OrderedDict()
        if isinstance(method, AsksClients):
            method.connect(self.ask, list(store.data))

    def exchange(
        self, tasks: Mapping[str, Task], round_number: int, absent: Container[str] = ()
    ) -> Iterator[Reply]:
        """Give each client its task and yield the replies as they come, in the tasks' order; a client's
        failure is a reply, not an error. Clients in ``absent`` take their task and never answer.
        """
        self._begin_round(tasks, round_number)
        width = self.method.widest_cohort()
        first = self.receiver.first(tasks, absent)
        early = dict(zip(first, self._work({name: tasks[name] for name in first}, width), strict=True))
        agreed = self.receiver.agreed({name: came.worked for name, came in early.items()}, len(tasks))
        present = {name: task for name, task in tasks.items() if name not in absent and name not in early}
        rest = self._work(present, width)
        for name in tasks:
            if name in absent:
                task, down = self.channel.down(tasks[name])
                yield Reply(name, task, None, "dropped out", "", down, 0, 0.0)
                continue
            came = early.pop(name)._replace(worked=agreed.pop(name)) if name in early else next(rest)
            yield self.receiver.reply(name, came.task, came.down, round_number, came.worked)
            del came  # before the next one comes
        self._messages.clear()

    def ask(self, tasks: Mapping[str, Task]) -> dict[str, Asked]:
        """The sound answers to tasks outside rounds; why others gave none is handed to the transport's
        ``note``. What clients remember of them is not kept.
        """
        if self._round is not None or not self._places:
            self._round = None
            self.pool.begin("outside rounds")
            self._places = {name: i % self.pool.count for i, name in enumerate(self.store.data)}
        answers = {}
        for (name, task), came in zip(tasks.items(), self._work(tasks, 1), strict=True):
            asked = self.receiver.asked(name, task, came.worked.answer, came.worked.seconds)
            if asked is not None:
                answers[name] = asked
        self._messages.clear()
        return answers

    def take_cuts(self) -> list[str]:
        """A sentence on each kind of texts that a worker cut or left out."""
        return self.pool.cuts()

    # --- parts ---

    def _begin_round(self, tasks: Mapping[str, Task], round_number: int) -> None:
        """Share out the clients of a round's first exchange; in a further one each stays where it was."""
        if round_number != self._round or not any(task.continues for task in tasks.values()):
            self._round, self._places = round_number, {}
            self.pool.begin(("round", next(self._numbers)))
        new = [name for name in tasks if name not in self._places]
        sizes = {name: _cost(tasks[name], self.store.data[name]) for name in new}
        self._places |= balanced(sizes, self.pool.count)

    def _work(self, tasks: Mapping[str, Task], width: int) -> Iterator[_Came]:
        """What came of each client's work, in the tasks' order."""
        parts = [[n for n in tasks if self._places[n] == number] for number in range(self.pool.count)]
        pieces = [[part[i : i + width] for i in range(0, len(part), width)] for part in parts]
        started: list[list[_Started]] = [[] for _ in parts]
        ready: dict[str, _Came] = {}

        def fill() -> None:
            for number, left in enumerate(pieces):
                while left and len(started[number]) < AHEAD:
                    piece = left.pop(0)
                    started[number].append(self._start(number, {name: tasks[name] for name in piece}))

        self.pool.forget()  # what nobody took of another exchange
        for name in tasks:
            fill()
            if name not in ready:
                place = self._places[name]
                answers = self.pool.fetch(place)
                one = started[place].pop(0)
                fill()
                ready |= self._received(one, answers)
                del one, answers
            yield ready.pop(name)

    def _start(self, number: int, tasks: Mapping[str, Task]) -> _Started:
        """Have a worker work for these clients."""
        sent = {name: self.channel.down(task) for name, task in tasks.items()}
        clients = {name: self.store.open(name) for name in tasks}
        references, places = list[Any](), list[int]()
        for task, _ in sent.values():
            reference = self._message(task.tensors)
            known = [place for place, other in enumerate(references) if other is reference]
            places.append(known[0] if known else len(references))
            if not known:
                references.append(reference)
        asked = {name: task for name, (task, _) in sent.items()}
        folders = [None if client.folder is None else str(client.folder) for client in clients.values()]
        head = encode_request(asked, places, folders)
        memories = [encode_memory(client.memory) for client in clients.values()]
        self.pool.submit(number, Call(tuple(tasks), head, memories, references, self._key(asked)))
        return _Started(sent, clients)

    def _key(self, tasks: Mapping[str, Task]) -> Hashable:
        """By what a call is known that may leave something in the worker's process, to be used by a further
        exchange of the round or a later question; None of one that trains, which leaves nothing. In a round
        none replaces another; outside rounds the newest of each kind is enough.
        """
        first = next(iter(tasks.values()))
        if isinstance(first, TrainingTask):
            return None
        return (first.kind, *tasks, next(self._numbers) if isinstance(first, RoundTask) else "")

    def _message(self, tensors: Tensors) -> Any:
        """The reference of tensors in Ray's object store, where the same ones are put once."""
        key = tuple((name, id(tensor)) for name, tensor in tensors.items())
        if key not in self._messages:
            self._messages[key] = tensors, self.pool.put(tensors)
            if len(self._messages) > KEPT:
                self._messages.popitem(last=False)
        return self._messages[key][1]

    def _received(self, started: _Started, answers: Sequence[ClientAnswer]) -> dict[str, _Came]:
        found = {}
        for (name, (task, down)), answer in zip(started.sent.items(), answers, strict=True):
            client = started.clients[name]
            given: Update | Exception
            try:
                given, client.memory = decode_answer(self.method.messages, task, answer)
            except (ClientFailure, WireError) as error:
                given = error
            found[name] = _Came(task, down, Worked(client, given, seconds_of(answer)))
        return found


class _Came(NamedTuple):
    """What came of a client's work on its task, as it got that, and the length of the task's message."""

    task: Task
    down: int
    worked: Worked


class _Started(NamedTuple):
    """A call that is under way: by client its task and the length of that one's message, and the clients."""

    sent: dict[str, tuple[Task, int]]
    clients: dict[str, Client]


def balanced(sizes: Mapping[str, float], parts: int) -> dict[str, int]:
    """The part that each belongs to, so that all parts are about equally large: the largest first, each to
    the part that has least (Graham 1969, at most a third more than the best division).
    """
    loads, places = [0.0] * parts, {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):  # equal ones stay in their order
        places[name] = loads.index(min(loads))
        loads[places[name]] += sizes[name]
    return places


def _cost(task: Task, data: ClientData) -> float:
    """How much a client has to do, roughly: its examples, or one where each does the same amount."""
    if isinstance(task, TrainingTask) and (task.work.steps or task.work.examples):
        return 1.0
    return 1.0 + len(data.train)
