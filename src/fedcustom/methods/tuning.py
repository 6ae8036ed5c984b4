"""The five verbs for every method that trains tensors; a method of this family says only which tensors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ..aggregation.mean import weighted_mean
from ..aggregation.server_optimizers import server_step
from ..aggregation.settings import AggregationSettings
from ..data.examples import Example
from ..data.settings import DataSettings
from ..data.tokens import Batch, TokenizedExample, collate, example_order, tokenize
from ..errors import DataError, UpdateError
from ..evaluation.settings import EvaluationSettings
from ..models.forward import classification_loss, generation_loss
from ..models.inference import Predictions, predict, to_device
from ..models.load import Base
from ..tensors import Tensors, count, is_finite
from ..training.local import schedule_factor, train_locally
from ..training.settings import TrainingSettings
from .contract import Client, Memory, State, Task, Update, Values

Keeps = Literal["nothing", "optimizer", "everything"]


@dataclass(frozen=True)
class Context:
    """What a method is built from, alike on the server and at every client.

    ``keeps`` says what a client keeps to itself between rounds: nothing (federated learning), its optimiser's
    moments (the centralised baseline, whose training never stops), or everything (the local baseline, which
    sends nothing).
    """

    base: Base
    data: DataSettings
    training: TrainingSettings
    aggregation: AggregationSettings
    evaluation: EvaluationSettings
    rounds: int
    seed: int
    keeps: Keeps = "nothing"


@dataclass
class Tuned:
    """A base model with the tensors that a method trains.

    ``parameters`` are trained by a client's optimiser; :meth:`read` and :meth:`write` are what travels. They
    are the same tensors unless a method says otherwise. ``head`` names those of the classification head.
    """

    model: Any
    parameters: dict[str, nn.Parameter]
    head: frozenset[str]
    save: Callable[[Path], None]
    load: Callable[[Path], None]
    read_hook: Callable[[Tensors], Tensors] | None = None
    write_hook: Callable[[Tensors], Tensors] | None = None
    active_dropout: list[nn.Module] = field(default_factory=list)

    def read(self) -> Tensors:
        """A copy of the tensors that travel."""
        with torch.no_grad():
            tensors = {name: p.detach().clone() for name, p in self.parameters.items()}
            return self.read_hook(tensors) if self.read_hook else tensors

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors that travelled into the model."""
        with torch.no_grad():
            values = self.write_hook(dict(tensors)) if self.write_hook else tensors
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])


class Technique(Protocol):
    """Which tensors a method trains, and how they act in the model."""

    def attach(self, base: Base, seed: int) -> Tuned:
        """Change ``base.model`` in place so that exactly the method's tensors and the head are trained.

        Raises:
            ModelError: the method does not fit the model.
        """


class WeightTuning:
    """The verbs of a :class:`~fedcustom.methods.contract.Method` that trains tensors by backpropagation.

    Discloses: each round, every client sends its trained tensors, its number of training examples and its
    mean training loss. Trained tensors can reveal training data to a server that attacks them.
    """

    def __init__(self, technique: Technique, context: Context) -> None:
        self.context = context
        self.base = context.base
        self.tuned = technique.attach(context.base, context.seed)
        prepare_precision(context.base, self.tuned)
        self._initial = self.tuned.read() if context.keeps == "everything" else {}
        self._tokens: dict[int, tuple[list[Example], list[TokenizedExample]]] = {}

    # --- server ---

    def start(self) -> State:
        """The tensors as the technique initialises them."""
        return State(self.tuned.read())

    def ask(self, state: State, round_number: int, work: Mapping[str, Values]) -> dict[str, Task]:
        """Train from the global state, for as long as ``work`` says (``epochs``, ``steps`` or
        ``examples``).
        """
        factor = schedule_factor(self.context.training, round_number, self.context.rounds)
        tensors = {} if self.context.keeps == "everything" else state.tensors
        return {
            name: Task("train", tensors, {"learning_rate_factor": factor, "round": round_number, **amount})
            for name, amount in work.items()
        }

    def check(self, task: Task, update: Update) -> None:
        """Refuse other names, shapes or dtypes than were sent, numbers that are not finite, weights that are
        not positive."""
        if update.tensors.keys() != task.tensors.keys():
            names = sorted(update.tensors.keys() ^ task.tensors.keys())
            raise UpdateError(f"wrong tensor names: {', '.join(names[:3])}")
        for name, expected in task.tensors.items():
            tensor = update.tensors[name]
            if tensor.shape != expected.shape:
                raise UpdateError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(expected.shape)}")
            if tensor.dtype != expected.dtype:
                raise UpdateError(f"{name} has dtype {tensor.dtype}, not {expected.dtype}")
        if not is_finite(update.tensors):
            raise UpdateError("an update holds numbers that are not finite")
        if not (isinstance(update.weight, int | float) and 0 < update.weight < 1e12):
            raise UpdateError(f"weight {update.weight!r} is not a positive number")
        loss = update.values.get("loss")
        if not isinstance(loss, int | float) or not math.isfinite(loss):
            raise UpdateError(f"training loss {loss!r} is not a finite number")

    def merge(self, state: State, updates: Iterable[tuple[str, Update]]) -> State:
        """The weighted mean, then the server optimiser; where clients keep everything, nothing is merged."""
        if self.context.keeps == "everything":
            for _ in updates:
                pass
            return state
        by_examples = self.context.aggregation.weighting == "examples"
        mean = weighted_mean((update.tensors, update.weight if by_examples else 1.0) for _, update in updates)
        tensors, moments = server_step(state.tensors, mean, state.server, self.context.aggregation)
        return State(tensors, moments, state.values)

    def finish(self, state: State, folder: Path) -> None:
        """Write the adapter or model of this state, with its tokenizer."""
        self.tuned.write(state.tensors)
        self.tuned.save(folder)
        self.base.tokenizer.save_pretrained(folder)

    def open(self, folder: Path) -> State:
        """The state of a model that :meth:`finish` wrote."""
        self.tuned.load(folder)
        return State(self.tuned.read())

    # --- client ---

    def work(self, task: Task, client: Client) -> Update:
        """Train on the client's own examples and return the tensors that travel.

        Raises:
            DataError: the client has nothing to train on.
            UpdateError: the training loss is not finite.
        """
        context, examples = self.context, self.tokens(client.data.train)
        if not examples:
            raise DataError(f"client {client.name!r} has no examples to train on")
        self.tuned.write(self._own(task.tensors, client.memory))
        start = int(client.memory.values.get("examples_seen", 0))
        ranges = batch_ranges(len(examples), start, context.training.batch_size, task.values)
        seed = [context.seed, 5, name_seed(client.name)]
        moments = {
            name.removeprefix("moments/"): tensor
            for name, tensor in client.memory.tensors.items()
            if name.startswith("moments/")
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(
                int.from_bytes(hashlib.sha256(repr([*seed, start]).encode()).digest()[:7], "big")
            )
            self.tuned.model.train(context.training.dropout)
            for module in self.tuned.active_dropout:
                module.train()
            result = train_locally(
                self.tuned.parameters,
                self._batches(examples, ranges, seed),
                self._loss,
                context.training,
                task.values["learning_rate_factor"],
                head=self.tuned.head,
                moments=moments,
            )
        client.memory.values["examples_seen"] = ranges[-1][1]
        tensors = self.tuned.read()
        if context.keeps != "nothing":
            kept = {f"moments/{name}": tensor.clone() for name, tensor in result.moments.items()}
            if context.keeps == "everything":
                kept |= {f"state/{name}": tensor for name, tensor in tensors.items()}
                tensors = {}
            client.memory.tensors = kept
        values = {"loss": result.loss, "examples": result.examples, "steps": result.steps}
        return Update(tensors, float(len(examples)), values)

    def predict(
        self, state: State, examples: list[Example], client: Client | None = None, *, texts: bool
    ) -> Predictions:
        """Predictions of the global state or, where clients keep everything, of the client's own."""
        tensors = state.tensors
        if client is not None:
            tensors = self._own(tensors, client.memory)
        self.tuned.write(tensors)
        return predict(
            self.tuned.model,
            self.base,
            self.tokens(examples),
            self.context.evaluation,
            texts=texts,
        )

    def sizes(self, state: State) -> tuple[int, int]:
        """How many numbers travel: the method's own, and the head's."""
        head = count(tensor for name, tensor in state.tensors.items() if name in self.tuned.head)
        return count(state.tensors.values()) - head, head

    # --- parts ---

    def tokens(self, examples: list[Example]) -> list[TokenizedExample]:
        """The examples' tokens, computed once a list."""
        key = id(examples)
        if key not in self._tokens:
            tokenized = tokenize(
                examples,
                self.base.tokenizer,
                self.base.task,
                self.context.data,
                sequence_to_sequence=self.base.sequence_to_sequence,
            )
            self._tokens[key] = (examples, tokenized)  # the list is kept alive, so that its id stays its own
        return self._tokens[key][1]

    def _own(self, tensors: Tensors, memory: Memory) -> Tensors:
        """The client's own state where it keeps one; before its first round that is the initial state."""
        own = {n.removeprefix("state/"): t for n, t in memory.tensors.items() if n.startswith("state/")}
        return own or tensors or self._initial

    def _batches(
        self, examples: list[TokenizedExample], ranges: list[tuple[int, int]], seed: list[int]
    ) -> Iterator[Batch]:
        order = example_order(len(examples), ranges[0][0], ranges[-1][1], seed)
        first = ranges[0][0]
        for start, stop in ranges:
            batch = collate(
                [examples[i] for i in order[start - first : stop - first]],
                self.base.tokenizer.pad_token_id,
                self.base.task,
                sequence_to_sequence=self.base.sequence_to_sequence,
            )
            yield to_device(batch, self.base.device)

    def _loss(self, batch: Batch) -> Tensor:
        with self.base.autocast():
            if self.base.task.kind == "classification":
                return classification_loss(self.tuned.model, batch)
            return generation_loss(
                self.tuned.model, batch, sequence_to_sequence=self.base.sequence_to_sequence
            )


def batch_ranges(count: int, start: int, batch_size: int, amount: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Where each batch begins and ends in the client's endless stream of examples.

    ``amount`` holds ``epochs``, ``steps`` or ``examples``. A batch never crosses the end of a pass over the
    client's ``count`` examples, so that one epoch is every example once in ceil(count / batch_size) steps.
    """
    stop = start + int(amount.get("examples", amount.get("epochs", 0) * count))
    steps = amount.get("steps", math.inf)
    if "steps" in amount:
        stop = start + steps * batch_size
    ranges: list[tuple[int, int]] = []
    while start < stop and len(ranges) < steps:
        end = min(start + batch_size, stop, (start // count + 1) * count)
        ranges.append((start, end))
        start = end
    return ranges


def name_seed(name: str) -> int:
    """A number for a client's name that is the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def prepare_precision(base: Base, tuned: Tuned) -> None:
    """Keep trained parameters in float32; with bfloat16, frozen matrices are stored in it as well."""
    for parameter in base.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        elif base.precision == "bfloat16" and parameter.dim() > 1:
            parameter.data = parameter.data.to(torch.bfloat16)
