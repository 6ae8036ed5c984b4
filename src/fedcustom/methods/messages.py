"""Messages between server and clients: the base classes of tasks and updates, and which answers which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, NamedTuple, TypeVar

from pydantic import Field

from ..core.errors import UpdateError
from ..core.tensors import Tensors
from .contents import CONTENTS, Content

M = TypeVar("M")

Whole = Annotated[int, Field(ge=0, lt=2**53)]
"""A whole number from 0, small enough for a float to hold it."""

Positive = Annotated[int, Field(ge=1, lt=2**53)]
"""A whole number from 1."""

RoundNumber = Annotated[int, Field(ge=1, lt=2**31)]
"""The number of a round, from 1."""

KEY, INLINE = "key", "inline"
"""Metadata of a message's field: its key in JSON, where that is not its name; and that its value is a
dataclass whose fields stand among those of the message.
"""


@dataclass(frozen=True)
class Work:
    """How much a client is to do: so many passes over its data, optimiser steps or examples. ``steps`` come
    before ``examples``, these before ``epochs``. With ``batches`` an epoch is made in so many steps.
    """

    epochs: Annotated[float, Field(gt=0)] | None = None
    steps: Positive | None = None
    examples: Positive | None = None
    batches: Positive | None = None


@dataclass(frozen=True)
class Task:
    """What the server asks of one client: the base class of tasks.

    Each kind of task is a frozen dataclass with keyword-only fields, defined beside the method that asks it.
    Its fields but ``tensors`` travel as JSON (:mod:`fedcustom.transport.messages`). A field that is ``None``
    or ``False`` by default is left out where it has that value; all others always travel.

    ``exact_answer`` says that the answer's tensors must arrive as they are, since they are no change of the
    state but figures to compute with: they are neither falsified nor compressed. ``exact_tensors`` says the
    same of the task's own tensors, where these are no state. ``contents`` are the kinds of content that the
    answer may hold, anything unless a class says less. ``exchange`` is the place of the task in its round: 1
    begins one, any other is a further exchange of a round that has begun; of a kind that follows itself it is
    the place of the first (:attr:`place`). Of the answers of one place there is one secure sum in a round.
    """

    kind: ClassVar[str]
    exact_answer: ClassVar[bool] = False
    exact_tensors: ClassVar[bool] = False
    contents: ClassVar[tuple[Content, ...]] = CONTENTS
    exchange: ClassVar[int] = 1

    tensors: Tensors = field(default_factory=dict)

    @property
    def continues(self) -> bool:
        """Whether the task is a further exchange of a round that has begun."""
        return self.exchange > 1

    @property
    def place(self) -> int:
        """The place of this task in its round."""
        return self.exchange

    @property
    def queries_asked(self) -> int:
        """How many queries of documents the task holds."""
        return 0

    @property
    def documents_asked(self) -> int:
        """How many documents the answer to one query may name or show."""
        return 0


@dataclass(frozen=True, kw_only=True)
class RoundTask(Task):
    """A task of a round."""

    round_number: RoundNumber = field(metadata={KEY: "round"})


@dataclass(frozen=True, kw_only=True)
class TrainingTask(RoundTask):
    """A task to train on the own examples, for as long as ``work`` says.

    ``learning_rate_factor`` is what the recipe's learning rates are multiplied by.
    """

    learning_rate_factor: float = 1.0
    work: Work = field(default=Work(), metadata={INLINE: True})


@dataclass(frozen=True)
class Update:
    """What a client answers: tensors, a weight in the mean, and what subclasses add: the base class of
    updates, which are dataclasses as tasks are.

    Where tensors are trained, ``tensors`` is the change: the client's new ones minus those it was sent.
    """

    tensors: Tensors = field(default_factory=dict)
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ChangeUpdate(Update):
    """An update whose tensors come of the client's training, so that they are merged with a weight: its
    number of training examples.
    """


@dataclass(frozen=True, kw_only=True)
class LossUpdate(Update):
    """An update with the client's mean loss, and the number of examples that it is the mean of."""

    loss: float
    examples: Positive


class MessagePair(NamedTuple):
    """The class of a kind of task, and that of the update that answers it."""

    task: type[Task]
    update: type[Update]


Messages = Mapping[str, MessagePair]
"""The messages of a method by the kind of task; no other is read from the wire."""


def message_kinds(*pairs: tuple[type[Task], type[Update]]) -> dict[str, MessagePair]:
    """A registry of messages, by the kind of task.

    Raises:
        ValueError: two tasks have the same kind.
    """
    found: dict[str, MessagePair] = {}
    for task, update in pairs:
        if task.kind in found:
            raise ValueError(f"two tasks of kind {task.kind!r}: {found[task.kind].task} and {task}")
        found[task.kind] = MessagePair(task, update)
    return found


def typed(message: Task | Update, wanted: type[M]) -> M:
    """The message as one of the ``wanted`` class.

    Raises:
        UpdateError: it is another one.
    """
    if not isinstance(message, wanted):
        raise UpdateError(f"a message is {type(message).__name__}, not {wanted.__name__}")
    return message
