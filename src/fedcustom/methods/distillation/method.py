"""Federated knowledge distillation: the method's five verbs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from ...core.errors import DataError, RecipeError
from ...core.tensors import Tensors
from ...data.examples import Example
from ...models.inference import Predictions
from ...training.local import schedule_factor
from ..messages import Task, Update, Work, typed
from ..protocol import Aggregate, Answer, Client, Prompts, State
from ..sequential_clients import SequentialClients
from ..tuning.export_check import Reference
from ..tuning.technique import Context
from .labels import LabelExchange
from .messages import MESSAGES, DistilTask, DistilUpdate
from .settings import DistillationSettings
from .student import Models, StudentModel
from .tokens import TokenExchange


class Exchange(Protocol):
    """What models tell each other of public texts, and what they learn from it."""

    def initialise(self) -> Tensors:
        """What the server keeps beside its model."""

    def configure(self, state: State, round_number: int, clients: Iterable[str]) -> dict[str, Tensors]:
        """What goes down to each client."""

    def check(self, task: DistilTask, tensors: Tensors) -> None:
        """Refuse what is not a sound answer."""

    def aggregate(self, state: State, answers: Iterable[Answer]) -> Aggregate:
        """What the server makes of the answers."""

    def learn(self, learner: StudentModel, task: DistilTask, client: Client) -> None:
        """What a client makes of what came down; changes its memory."""

    def say(self, learner: StudentModel, task: DistilTask, client: Client) -> Tensors:
        """A client's answer."""


class Distillation(SequentialClients):
    """Federated distillation: every client trains a model of its own, which is never sent.

    A round: the client learns from what came down (directions down and both), trains on its private examples,
    and answers what its model says of the public texts that it is asked about; the server makes one teacher
    of the answers, and its own model learns from that (directions up and both).

    Discloses: each round, every client sends what its model says of public texts (probabilities, rounded to
    ``bits`` bits; with ``top_k`` the largest alone), its number of training examples and its mean training
    loss. The probabilities show which labels or words a client's data hold and how well its model knows them;
    whether a given text was among its training examples can sometimes be guessed from them. Weights,
    gradients and private texts do not travel.
    """

    messages = MESSAGES

    def __init__(self, settings: DistillationSettings, context: Context) -> None:
        self.settings, self.context = settings, context
        self.models = Models(settings, context)
        self.exchange: Exchange
        if context.data.task == "classification":
            self.exchange = LabelExchange(settings, context, self.models)
        else:
            self.exchange = TokenExchange(settings, context, self.models)
        self.alone = context.keeps == "everything"
        self.serves = settings.has_server_model and not self.alone

    # --- server ---

    def initialise(self) -> State:
        """The server's untrained model, if it has one.

        Raises:
            DataError: the public set is empty.
        """
        if self.alone:
            return State({})
        if not self.context.public:
            raise DataError(
                "public set: holds no text but such as are test or development inputs; raise public.fraction "
                "or name another public.source"
            )
        tensors = self.models.server.trainable.read() if self.serves else {}
        return State(tensors, self.exchange.initialise())

    def configure(self, state: State, round_number: int, work: Mapping[str, Work]) -> dict[str, Task]:
        """Learn from the others, train on your own examples, and say what you think of these public texts."""
        factor = schedule_factor(self.context.training, round_number, self.context.rounds)
        tensors: Mapping[str, Tensors] = {name: {} for name in work}
        if not self.alone:
            tensors = self.exchange.configure(state, round_number, work)
        return {
            name: DistilTask(
                tensors[name],
                round_number=round_number,
                learning_rate_factor=factor,
                model=self.models.number_of(name),
                work=amount,
            )
            for name, amount in work.items()
        }

    def check(self, task: Task, update: Update) -> None:
        """Refuse other tensors than were asked for, rows that are no probabilities, labels that do not exist,
        and weights, losses and steps that cannot be.
        """
        asked, said = typed(task, DistilTask), typed(update, DistilUpdate)
        self._learner(asked).check(asked.training(), replace(said, tensors={}))
        if self.alone:
            return
        self.exchange.check(asked, said.tensors)

    def aggregate(self, state: State, answers: Iterable[Answer]) -> Aggregate:
        """The next state of the server; in a local run, where nothing is said, the old one."""
        if self.alone:
            for _ in answers:
                pass
            return Aggregate(state)
        return self.exchange.aggregate(state, answers)

    def export(self, state: State, folder: Path) -> None:
        """Write the server's model: a whole one, or a PEFT adapter with ``server_method = "lora"``."""
        self.models.server.export(State(state.tensors), folder)

    def reference(self, state: State, examples: Sequence[Example]) -> Reference:
        """The outputs of the server's model, for the check of its export."""
        return self.models.server.reference(State(state.tensors), examples)

    def open(self, folder: Path) -> State:
        """The state of a model that :meth:`export` wrote."""
        return self.models.server.open(folder)

    # --- client ---

    def execute(self, task: Task, client: Client) -> Update:
        """Learn from what came down, train on the own examples, and answer.

        Raises:
            DataError: the client has nothing to train on.
            UpdateError: a loss is not finite.
        """
        asked = typed(task, DistilTask)
        learner = self._learner(asked)
        self.exchange.learn(learner, asked, client)
        trained = learner.train(asked.training(), client)
        return DistilUpdate(
            self.exchange.say(learner, asked, client),
            trained.weight,
            loss=trained.loss,
            examples=trained.examples,
            steps=trained.steps,
        )

    def predict(
        self, state: State, examples: list[Example], client: Client | None = None, *, texts: bool
    ) -> Predictions:
        """Predictions of the server's model or, for a client, of the client's own."""
        if client is None:
            return self.models.server.predict(State(state.tensors), examples, texts=texts)
        learner = self.models.of(self.models.number_of(client.name))
        return learner.predict(State({}), examples, client, texts=texts)

    def prompts(self, state: State, examples: Sequence[Example]) -> Prompts:
        """The examples' inputs, and the server's model."""
        return self.models.server.prompts(State(state.tensors), examples)

    def keeps_parts(self) -> bool:
        """Clients have models of their own."""
        return True

    def adapt(self, state: State, client: Client, epochs: int) -> State:
        """Not for distillation, whose clients' models are their own already.

        Raises:
            RecipeError: always.
        """
        raise RecipeError("personalisation.finetune_epochs: clients of distillation train their own models")

    def notes(self, state: State) -> dict[str, str]:
        """None: what was trained is in the model's folder."""
        return {}

    def sizes(self, state: State) -> tuple[int, int]:
        """How many numbers are trained in the server's model (or in the first client's, where there is none):
        the method's own, and the head's.
        """
        learner = self.models.server if self.serves else self.models.of(0)
        return learner.sizes(state)

    # --- parts ---

    def _learner(self, task: DistilTask) -> StudentModel:
        return self.models.of(task.model)
