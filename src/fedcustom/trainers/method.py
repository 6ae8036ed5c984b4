"""The method protocol on a user's Trainer: what travels are the trained parameters of its model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ..aggregation.combine import Change, combine
from ..aggregation.server_optimizers import server_step
from ..aggregation.settings import AggregationSettings
from ..core.errors import RunError, UpdateError
from ..core.tensors import count, is_finite, subtract
from ..data.examples import Example
from ..methods.messages import Messages, Task, Update, Work, message_kinds, typed
from ..methods.protocol import Aggregate, Answer, Client, State
from ..methods.sequential_clients import SequentialClients
from ..methods.tuning.messages import TrainTask, TrainUpdate
from ..methods.tuning.update_checks import check_forms
from ..models.inference import Predictions
from .local_trainer import LocalTrainer


class TrainerMethod(SequentialClients):
    """The verbs of a :class:`~fedcustom.methods.protocol.Method`, with a Trainer in the place of local
    training.

    Discloses: each round, every client sends the change of the trained parameters, its number of rows, its
    mean training loss and its numbers of steps and examples.

    Args:
        local: The Trainer and the clients' datasets.
        aggregation: The rule and the server optimiser.
        seed: Of all random numbers of local training.
    """

    def __init__(self, local: LocalTrainer, aggregation: AggregationSettings, seed: int) -> None:
        self.local, self.aggregation, self.seed = local, aggregation, seed

    @property
    def messages(self) -> Messages:
        """Training alone."""
        return message_kinds((TrainTask, TrainUpdate))

    def initialise(self) -> State:
        """The trained parameters as they are in the Trainer's model."""
        return State(self.local.read())

    def configure(self, state: State, round_number: int, work: Mapping[str, Work]) -> dict[str, Task]:
        """The global state for each client. How much a client does, the Trainer's arguments say."""
        return {
            name: TrainTask(state.tensors, round_number=round_number, work=amount)
            for name, amount in work.items()
        }

    def execute(self, task: Task, client: Client) -> TrainUpdate:
        """Train on the client's dataset."""
        number = typed(task, TrainTask).round_number
        trained = self.local.train(client.name, task.tensors, self.seed, number)
        return TrainUpdate(
            subtract(trained.tensors, task.tensors),
            weight=float(self.local.sizes[client.name]),
            loss=trained.loss,
            examples=trained.examples,
            steps=trained.steps,
        )

    def check(self, task: Task, update: Update) -> None:
        """Refuse numbers that are not finite, and other names or shapes than were sent.

        Raises:
            UpdateError: names what is wrong.
        """
        if not is_finite(update.tensors):
            raise UpdateError("an update holds numbers that are not finite")
        trained = typed(update, TrainUpdate)
        check_forms(trained.tensors, task.tensors)
        if trained.loss is None or not math.isfinite(trained.loss):
            raise UpdateError(f"training loss {trained.loss!r} is not a finite number")

    def aggregate(self, state: State, answers: Iterable[Answer]) -> Aggregate:
        """One change by the rule, which the server optimiser follows."""

        def changes() -> Iterator[Change]:
            for answer in answers:
                update = typed(answer.update, TrainUpdate)
                yield Change(answer.client, update.tensors, update.weight, update.steps, answer.discount)
                del answer, update  # before the next one is made

        change = combine(changes(), self.aggregation)
        tensors, moments = server_step(state.tensors, change, state.server, self.aggregation)
        return Aggregate(State(tensors, moments, dict(state.values)))

    def export(self, state: State, folder: Path) -> None:
        """Write the model of this state (:meth:`.local_trainer.LocalTrainer.save`)."""
        self.local.write(state.tensors)
        self.local.save(folder)

    def open(self, folder: Path) -> State:
        """Not there: the written model loads by peft or transformers.

        Raises:
            RunError: always.
        """
        raise RunError(f"{folder}: load the model with peft or transformers")

    def predict(
        self, state: State, examples: list[Example], client: Client | None = None, *, texts: bool
    ) -> Predictions:
        """Not there: the Trainer predicts on datasets of its own form.

        Raises:
            RunError: always.
        """
        raise RunError("federate: use trainer.predict; its model holds the best round's state")

    def keeps_parts(self) -> bool:
        """No: all that is trained travels."""
        return False

    def adapt(self, state: State, client: Client, epochs: int) -> State:
        """Not there: clients have no versions of their own.

        Raises:
            RunError: always.
        """
        raise RunError("federate: clients have no versions of their own")

    def notes(self, state: State) -> dict[str, str]:
        """None."""
        return {}

    def sizes(self, state: State) -> tuple[int, int]:
        """How many numbers are trained. Which of them are a head is not known."""
        return count(state.tensors.values()), 0
