"""Local baseline for methods whose state fits into a client's memory: each client is its own server."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ...core.errors import RunError, UpdateError
from ...core.tensors import named, part
from ...data.examples import Example
from ...models.inference import Predictions
from ..messages import Task, Update, Work, typed
from ..protocol import Aggregate, Answer, Client, Memory, Method, State
from ..sequential_clients import SequentialClients
from .messages import ALONE, AloneTask, AloneUpdate, AnswerQueriesUpdate, ScoreUpdate, SearchUpdate

OWN = "own"


class Alone(SequentialClients):
    """Drives a method at every client by itself: it asks itself, answers and merges its one answer. What
    comes of it stays in the client's memory; nothing is sent.
    """

    messages = ALONE

    def __init__(self, method: Method) -> None:
        self.method = method

    def initialise(self) -> State:
        """The state from which every client starts."""
        return self.method.initialise()

    def configure(self, state: State, round_number: int, work: Mapping[str, Work]) -> dict[str, Task]:
        """Go on by yourself."""
        return {name: AloneTask(round_number=round_number) for name in work}

    def execute(self, task: Task, client: Client) -> Update:
        """One round of the method with one client."""
        number = typed(task, AloneTask).round_number
        state = self._own(client.memory) or self.method.initialise()
        asked = self.method.configure(state, number, {client.name: Work()})[client.name]
        update = self.method.execute(asked, client)
        self.method.check(asked, update)
        state = self.method.aggregate(state, [Answer(client.name, asked, update)]).state
        client.memory.values[OWN] = state.values
        client.memory.tensors |= named(state.tensors, f"{OWN}/") | named(state.server, f"{OWN}-server/")
        examples = 1
        if isinstance(update, ScoreUpdate | AnswerQueriesUpdate | SearchUpdate):
            examples = update.examples
        return AloneUpdate(examples=examples)

    def check(self, task: Task, update: Update) -> None:
        """Refuse anything that is sent."""
        if update.tensors:
            raise UpdateError("a local client sends no tensors")

    def aggregate(self, state: State, answers: Iterable[Answer]) -> Aggregate:
        """Nothing is merged."""
        for _ in answers:
            pass
        return Aggregate(state)

    def predict(
        self, state: State, examples: list[Example], client: Client | None = None, *, texts: bool
    ) -> Predictions:
        """What the client's own prompt gives."""
        own = self._own(client.memory) if client is not None else None
        return self.method.predict(own or state, examples, texts=texts)

    def export(self, state: State, folder: Path) -> None:
        """There is no one prompt.

        Raises:
            RunError: always.
        """
        raise RunError("a local baseline has one prompt for each client")

    def open(self, folder: Path) -> State:
        """The state of a prompt that was written by another run."""
        return self.method.open(folder)

    def keeps_parts(self) -> bool:
        """No: clients share nothing."""
        return False

    def adapt(self, state: State, client: Client, epochs: int) -> State:
        """See the method itself."""
        return self.method.adapt(state, client, epochs)

    def notes(self, state: State) -> dict[str, str]:
        """None: each client has a prompt of its own."""
        return {}

    def sizes(self, state: State) -> tuple[int, int]:
        """Those of the method."""
        return self.method.sizes(state)

    @staticmethod
    def _own(memory: Memory) -> State | None:
        if OWN not in memory.values:
            return None
        tensors = memory.tensors
        return State(part(tensors, f"{OWN}/"), part(tensors, f"{OWN}-server/"), memory.values[OWN])
