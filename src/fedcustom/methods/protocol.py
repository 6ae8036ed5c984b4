"""The method protocol: initialise, configure, execute, aggregate, export."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ..core.tensors import Tensors
from ..data.examples import ClientData, Example
from ..models.inference import Predictions
from ..models.load import Base
from .messages import Messages, Task, Update, Work

Values = dict[str, Any]
"""Numbers, texts and lists or dicts of them: what JSON can hold."""


UNFINISHED = "unfinished"
"""The value of a state that says that its round is not over: the same clients are to be asked again, by a
task of the kind that it names.
"""


@dataclass(frozen=True)
class Answer:
    """A client's sound update, with the task that it answers.

    ``discount`` is what a late change is multiplied by: 1 for one that is on time. ``summed`` are the clients
    of which the update is the mean, where the server is shown no client's own.
    """

    client: str
    task: Task
    update: Update
    discount: float = 1.0
    summed: tuple[str, ...] = ()

    @property
    def clients(self) -> tuple[str, ...]:
        """The clients that answered: one, but for a sum."""
        return self.summed or (self.client,)


@dataclass(frozen=True)
class AggregateContext:
    """What is known when a cohort's change has been combined: the round of the newest task that was answered,
    and the clients that answered, in the order in which their answers came.
    """

    round_number: int
    clients: tuple[str, ...]


class AggregateTransform(Protocol):
    """What may act on a cohort's change (:class:`fedcustom.updates.transform.UpdateTransform`)."""

    def on_aggregate(self, delta: Tensors, context: AggregateContext) -> Tensors:
        """The change that the server optimiser follows, in place of the one that the rule gave."""


def peeked(answers: Iterable[Answer]) -> tuple[Task | None, Iterator[Answer]]:
    """The task of the first answer (None: there are no answers), and all answers. None of them is held longer
    than its reader holds it.
    """
    stream = iter(answers)
    first = list(islice(stream, 1))
    task = first[0].task if first else None

    def all_of_them() -> Iterator[Answer]:
        while first:
            yield first.pop()
        yield from stream

    return task, all_of_them()


@dataclass(frozen=True)
class State:
    """What the server holds between rounds.

    ``tensors`` is the global state that clients start from, ``server`` what only the server needs (moments of
    its optimiser), ``values`` numbers and texts. All of it is what the next round needs, and nothing else.
    """

    tensors: Tensors
    server: Tensors = field(default_factory=dict)
    values: Values = field(default_factory=dict)


@dataclass(frozen=True)
class Aggregate:
    """What a method makes of a round's answers: the next state, and what it reports of the round.

    The ``report`` holds figures and short texts for the round's row of metrics (``method`` there). It is not
    sent, and the next round does not see it. ``may_end`` is whether the round may end with this state: not
    where it waits for a further exchange (:data:`UNFINISHED`) without which it is nothing.
    """

    state: State
    report: Values = field(default_factory=dict)
    may_end: bool = True


@dataclass
class Memory:
    """What a client keeps to itself from one round to the next; never sent."""

    tensors: Tensors = field(default_factory=dict)
    values: Values = field(default_factory=dict)


@dataclass
class Client:
    """One owner of data: its name, its private examples, its private memory and, for what does not fit into
    that, a folder on its own disk.
    """

    name: str
    data: ClientData
    memory: Memory = field(default_factory=Memory)
    folder: Path | None = None


@dataclass(frozen=True)
class Asked:
    """A client's sound answer to a task outside rounds, and the bytes of both messages."""

    update: Update
    bytes_down: int
    bytes_up: int


@runtime_checkable
class AsksClients(Protocol):
    """A method that asks its clients outside rounds too: to search, say."""

    def connect(self, ask: Callable[[Mapping[str, Task]], dict[str, Asked]], clients: Sequence[str]) -> None:
        """Give the method a way to its clients: from tasks to the sound answers of those who gave one."""

    def bytes_a_query(self) -> tuple[float, float]:
        """What one query of the last evaluation took, mean over its queries: bytes down to the clients that
        it was sent to, and bytes of their answers; both NaN before there was one.
        """


@runtime_checkable
class CountsCuts(Protocol):
    """A method that cuts or leaves out texts beside the inputs and targets that are counted before the first
    round (:mod:`fedcustom.data.truncation_count`).
    """

    def take_cuts(self) -> list[str]:
        """A sentence on each kind of texts that were cut or left out since the last call."""


@runtime_checkable
class ChecksTasks(Protocol):
    """A method that knows how much a task may ask of a client by the recipe, beside the work of training."""

    def check_task(self, task: Task) -> None:
        """Refuse a task that asks for more than the recipe does.

        Raises:
            PolicyError: names what the task asks for, and what the recipe says.
        """

    def check_state(self, state: State) -> None:
        """Refuse to evaluate a state that would take more memory than the recipe's own.

        Raises:
            PolicyError: names what is too long, or too many.
        """


@dataclass(frozen=True)
class Prompts:
    """What a model goes on from when it writes.

    Attributes:
        model: the model in a state, which is in it until the method is given another.
        base: the base model that it is made of, with its tokenizer.
        sources: the token ids of each prompt, without virtual tokens.
        stop: texts before which a written text ends.
    """

    model: Any
    base: Base
    sources: list[list[int]]
    stop: tuple[str, ...] = ()


@runtime_checkable
class WritesTexts(Protocol):
    """A method whose model can write a text token by token (:mod:`fedcustom.models.writing`)."""

    def prompts(self, state: State, examples: Sequence[Example]) -> Prompts:
        """The prompts after which :meth:`Method.predict` writes its texts, and the model that does."""


@runtime_checkable
class HasRemarks(Protocol):
    """A method that knows what users should be told of how it works on this model."""

    def remarks(self) -> list[str]:
        """One sentence each."""


@runtime_checkable
class TransformsUpdates(Protocol):
    """A method whose clients send changes of tensors, on which a run's transforms act."""

    def untransformed(self, *, aggregate: bool) -> list[str]:
        """What no transform acts on, each with the setting that asks for it: of what clients send or, with
        ``aggregate``, also of what is made of that.
        """


@runtime_checkable
class SumsChanges(Protocol):
    """A method whose clients' changes are merged by their weighted mean, so that a server need only see their
    sum.
    """

    def change_forms(self, task: Task) -> Tensors:
        """Names, shapes and dtypes of what a client's answer to a task changes.

        Raises:
            UpdateError: the task does not ask for a change.
        """


@dataclass(frozen=True)
class FigureForm:
    """The form of a tensor of exact figures that add up over clients: its shape, and the largest size of one
    of its numbers in the sum of all clients. Without a ``bound`` they are whole numbers from 0.
    """

    shape: tuple[int, ...]
    bound: float | None = None


@runtime_checkable
class SumsFigures(Protocol):
    """A method some of whose tasks are answered by exact figures, of which a server need only see the sum."""

    @property
    def messages(self) -> Messages:
        """Its kinds of tasks and updates."""

    def figure_forms(self, task: Task) -> Mapping[str, FigureForm] | None:
        """The forms of what answers a task; None where that is a change, or may not be summed."""


@runtime_checkable
class ScalesLogits(Protocol):
    """A method whose classifier's logits can be multiplied by a number that becomes part of the model."""

    def scaled(self, state: State, factor: float) -> State | None:
        """The state whose logits are ``factor`` times as large; None where its head does not end in a linear
        layer.
        """


class Method(Protocol):
    """A way of customising a model. Constructed alike on the server and at every client, from the same
    recipe.
    """

    @property
    def messages(self) -> Messages:
        """Its kinds of tasks and updates."""

    def initialise(self) -> State:
        """The first global state."""

    def configure(self, state: State, round_number: int, work: Mapping[str, Work]) -> dict[str, Task]:
        """The round's tasks, one for each client named in ``work``, which says how much each is to do."""

    def execute(self, task: Task, client: Client) -> Update:
        """The task done on the client's private data. Changes the client's memory, and nothing else that
        lasts.
        """

    def widest_cohort(self) -> int:
        """How many clients :meth:`execute_together` should be given at once; 1 if that gains nothing."""

    def execute_together(self, pairs: Sequence[tuple[Task, Client]]) -> list[Update | Exception]:
        """The tasks of several clients of one process, as :meth:`execute` would do them; an exception where
        it would have raised one.
        """

    def aggregate(self, state: State, answers: Iterable[Answer]) -> Aggregate:
        """The next global state and a report of the round. Consumes the answers one by one, as they come."""

    def export(self, state: State, folder: Path) -> None:
        """Write the customised model so that it loads with the ecosystem's own tools."""

    def open(self, folder: Path) -> State:
        """The state of a model that :meth:`export` wrote."""

    def check(self, task: Task, update: Update) -> None:
        """Refuse an update that is not a sound answer to the task
        (:class:`~fedcustom.core.errors.UpdateError`).
        """

    def predict(
        self, state: State, examples: list[Example], client: Client | None = None, *, texts: bool
    ) -> Predictions:
        """What the model in this state, or this client's own version of it, says of the examples."""

    def keeps_parts(self) -> bool:
        """Whether clients keep parts of the model to themselves, so that each has a version of its own."""

    def adapt(self, state: State, client: Client, epochs: int) -> State:
        """What the client's own version becomes when it trains on with its data; nothing is sent."""

    def notes(self, state: State) -> dict[str, str]:
        """Texts that belong beside the run's summary, by file name (a prompt to be used elsewhere)."""

    def sizes(self, state: State) -> tuple[int, int]:
        """How many numbers are trained: the method's own, and the classification head's."""
