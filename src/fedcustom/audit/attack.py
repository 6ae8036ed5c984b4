"""The attack protocol: what an attack sees of a round, and what it says of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol

from ..core.errors import FedcustomError
from ..data.examples import Example, FederatedData
from ..federated.private_run import PrivateRun
from ..methods import Method, State, Task, Work
from ..methods.messages import Update
from ..recipe import Recipe
from .knowledge import Knowledge
from .results import Finding, NotRun, View

RoundKind = Literal["training", "fitting the head", "finished"]
"""What clients do in a round; ``finished`` is no round, but all that was released when the run is over."""

UNSEEN = "secure sums: the server sees the sum of the clients' changes, and no client's own"
"""Why a client's update is not attacked where a run has secure sums."""

SPARE = 0.9
"""Of the time that is left, what an attack plans to use."""


LATE = "no time; raise --minutes"
"""Why an attack that began in vain, or a round, is missing."""


class OutOfTime(Exception):
    """The time of the audit is over."""


class CannotAttack(FedcustomError):
    """An attack does not apply to what it was given; says why."""


@dataclass(frozen=True)
class Deadline:
    """Until when an audit may go on, by :func:`time.monotonic`."""

    at: float

    @property
    def left(self) -> float:
        """Seconds that are left; below 0 when the time is over."""
        return self.at - time.monotonic()

    def check(self) -> None:
        """Stop an attack whose time is over.

        Raises:
            OutOfTime: it is.
        """
        if self.left < 0:
            raise OutOfTime

    def fitting(self, seconds: float, wanted: int) -> int:
        """How many of ``wanted`` steps there is time for, if each takes so many ``seconds`` as one has now
        taken: a busy machine is slower than the one that the run was made on.
        """
        return max(0, int(min(wanted, SPARE * self.left / max(seconds, 1e-9))))


@dataclass(frozen=True)
class Target:
    """The run that is attacked. ``data`` are the examples that the clients trained on: the truth by which an
    attack is judged, and the texts from which its candidates are drawn. ``delta`` is that of lower bounds on
    epsilon, ``private`` the mechanism of a run that hides clients, ``cohorts`` who answered in each round,
    by its number.
    """

    recipe: Recipe
    data: FederatedData
    method: Method
    delta: float = 1e-5
    private: PrivateRun | None = None
    cohorts: Mapping[int, Sequence[str]] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """That of the recipe, by which candidates are drawn."""
        return self.recipe.seed

    @property
    def sums_only(self) -> bool:
        """Whether the server is shown sums of clients' changes, and no client's own."""
        return self.recipe.secure_sum is not None and self.recipe.secure_sum.on

    @cached_property
    def knowledge(self) -> Knowledge:
        """What anybody who has the base model can compute from a state and a text.

        Raises:
            CannotAttack: the method trains no tensors.
        """
        from ..methods import WeightTuning

        if not isinstance(self.method, WeightTuning):
            raise CannotAttack(f"method {self.recipe.method.name} sends no changes of trained tensors")
        return Knowledge(self.method)

    @property
    def no_gradients(self) -> str | None:
        """Why changes cannot be compared with gradients of texts; None where they can."""
        try:
            parts = self.knowledge.parts
        except CannotAttack as error:
            return str(error)
        if packs := parts.hooks.packs:
            return f"clients send {packs}, whose coordinates are not those of gradients"
        if parts.trainable.corrects:
            return None
        return "what travels is made by a network from what is trained, so that gradients have another form"

    @cached_property
    def texts(self) -> list[Example]:
        """All training examples of all clients."""
        return [example for client in self.data.clients.values() for example in client.train]


@dataclass(frozen=True)
class Received:
    """One message of a client as the server gets it, after compression and all other transforms."""

    client: str
    task: Task
    update: Update


@dataclass(frozen=True)
class Summed:
    """The mean of these clients' updates, in place of which the server gets none under secure sums."""

    clients: tuple[str, ...]
    task: Task
    update: Update


@dataclass(frozen=True)
class RoundView:
    """What can be seen of one round.

    ``answered`` are all clients whose messages came; ``received`` has the messages of as many as there was
    memory for, the others count as ``unseen``; it is empty where a trusted server's view is not looked at,
    and under secure sums, of which ``sums`` are what the server gets, and ``summed`` the last one.
    ``before`` and ``after`` are the global states; of a run that is ``finished``, number 0, the first one
    and the one that is released.
    """

    number: int
    kind: RoundKind
    before: State
    after: State
    received: Sequence[Received]
    answered: Sequence[str] = ()
    unseen: int = 0
    summed: Summed | None = None
    sums: Sequence[Summed] = ()

    @cached_property
    def by_client(self) -> Mapping[str, list[Received]]:
        """The messages of each client, in the order in which they came."""
        found: dict[str, list[Received]] = {}
        for message in self.received:
            found.setdefault(message.client, []).append(message)
        return found

    def task(self, target: Target) -> Task:
        """A task of the round, as any of its clients got it.

        Raises:
            CannotAttack: nobody took part.
        """
        if self.received:
            return self.received[0].task
        if self.sums:
            return self.sums[0].task
        if self.summed is not None:
            return self.summed.task
        if not self.answered:
            raise CannotAttack("nobody took part in the round")
        name = self.answered[0]
        return target.method.configure(self.before, self.number, {name: Work(epochs=1)})[name]


class Attack(Protocol):
    """One attack. ``views`` says what it looks at, ``kinds`` the rounds in which there is such a thing,
    ``source`` where it is from.
    """

    name: str
    views: tuple[View, ...]
    kinds: tuple[RoundKind, ...]
    source: str

    def inapplicable(self, target: Target) -> str | None:
        """Why the attack does not apply to a run; None where it does."""

    def attack(self, target: Target, seen: RoundView, deadline: Deadline) -> Sequence[Finding | NotRun]:
        """What the attack finds in one round, and which part of it could not be made.

        Raises:
            CannotAttack: the round has nothing that it could attack; says why.
            OutOfTime: the deadline has passed.
        """


@dataclass
class Keeper:
    """Keeps the messages of a round, as far as they fit into ``room`` bytes."""

    room: int
    messages: list[Received] = field(default_factory=list)
    sums: list[Summed] = field(default_factory=list)
    answered: dict[str, None] = field(default_factory=dict)
    unseen: dict[str, None] = field(default_factory=dict)

    @property
    def summed(self) -> Summed | None:
        """The last sum."""
        return self.sums[-1] if self.sums else None

    def take_sum(self, summed: Summed) -> None:
        """Keep the sum of some clients' updates."""
        self.sums.append(summed)
        self.answered |= dict.fromkeys(summed.clients)

    def take(self, message: Received) -> None:
        """Keep a message, or note that there is no room; a client is kept with all its messages or none."""
        self.answered[message.client] = None
        size = _size(message)
        if message.client in self.unseen or size > self.room:
            self.unseen[message.client] = None
            self.room += sum(_size(kept) for kept in self.messages if kept.client == message.client)
            self.messages = [kept for kept in self.messages if kept.client != message.client]
            return
        self.room -= size
        self.messages.append(message)


def _size(message: Received) -> int:
    return sum(t.numel() * t.element_size() for t in message.update.tensors.values())
