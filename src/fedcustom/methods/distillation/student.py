"""Student training: on private examples, and on other models' outputs."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...aggregation.settings import AggregationSettings
from ...core.errors import ModelError
from ...core.tensors import Tensors, part, without
from ...data.tokens import Batch
from ...models.configuration import context_length, load_configuration
from ...models.load import Base, load_base
from ...models.settings import ModelSettings
from ...training.local import train_locally
from ...training.settings import TrainingSettings
from ..full.method import Full
from ..full.settings import FullSettings
from ..lora.method import Lora
from ..lora.settings import LoraSettings
from ..messages import typed
from ..protocol import Client
from ..registry import check_padding
from ..tuning.messages import TrainTask, TrainUpdate
from ..tuning.method import WeightTuning
from ..tuning.technique import Context, Technique
from .settings import DistillationSettings, Tuning


class StudentModel(WeightTuning):
    """A resident base model, which the server or those clients whose model it is train as their own.

    Whose tensors are in it changes from call to call: a client's come out of its memory and go back there.
    """

    def __init__(self, technique: Technique, context: Context) -> None:
        own = replace(context, keeps="everything", keep_local=(), aggregation=AggregationSettings())
        super().__init__(technique, own)

    def train(self, task: TrainTask, client: Client) -> TrainUpdate:
        """Train the client's model on its own examples, with a fresh optimiser. The update has no tensors.

        Raises:
            DataError, UpdateError: see :meth:`WeightTuning.work`.
        """
        update = typed(self.execute(task, client), TrainUpdate)
        client.memory.tensors = without(client.memory.tensors, "moments/")
        return update

    def imitate(
        self,
        tensors: Tensors,
        batches: Iterable[Batch],
        loss_of: Callable[[Batch], Tensor],
        training: TrainingSettings,
        factor: float,
        seed: Sequence[object],
    ) -> tuple[Tensors, float]:
        """``tensors`` after training on ``batches`` with a loss that compares with a teacher, and the mean
        loss.

        Raises:
            UpdateError: the loss is not finite.
        """
        self.put(tensors)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(hashlib.sha256(repr(list(seed)).encode()).digest()[:7], "big"))
            self.trainable.model.train(self.context.training.dropout)
            for module in self.trainable.active_dropout:
                module.train()
            steps = ([(batch, 1.0)] for batch in batches)
            result = train_locally(
                self.trainable.parameters,
                steps,
                loss_of,
                training,
                factor,
                head=self.trainable.head,
                matrices=self.trainable.matrices,
            )
        assert result.loss is not None
        return self.trainable.read(), result.loss

    def put(self, tensors: Tensors) -> None:
        """Put tensors into the model; what they lack is as it was initialised."""
        self.trainable.write(self.ownership.complete(tensors))


def own_tensors(client: Client) -> Tensors:
    """The client's own model; empty where it has not been trained."""
    return part(client.memory.tensors, "state/")


class Models:
    """The resident base models: the server's, and one for each different base model of the clients."""

    def __init__(self, settings: DistillationSettings, context: Context) -> None:
        self.settings, self.context = settings, context
        self.bases = settings.client_models or [context.model.base]
        if context.names:  # to predict, nobody's model but the server's is needed
            self._check_context_lengths()
        self._learners: dict[tuple[str, Tuning], StudentModel] = {}
        self.server = self._learner(context.model.base, settings.server_method)
        for number in range(len(self.bases)) if context.names else []:
            self.of(number)

    def number_of(self, client: str) -> int:
        """Which of the bases is a client's: they are given out in turn, in the order of the clients."""
        return self.context.names.index(client) % len(self.bases)

    def of(self, number: int) -> StudentModel:
        """The clients' resident model of a base, by the base's number."""
        return self._learner(self.bases[number], self.settings.client_method)

    def each(self) -> Iterator[StudentModel]:
        """All resident models."""
        yield from self._learners.values()

    def _learner(self, base: str, method: Tuning) -> StudentModel:
        if (base, method) not in self._learners:
            settings = self.settings.tuning(method)
            technique = Lora(settings) if isinstance(settings, LoraSettings) else Full(FullSettings())
            # The first is the server's, whose base is there already.
            context = replace(self.context, base=self._load(base)) if self._learners else self.context
            self._learners[base, method] = StudentModel(technique, context)
        return self._learners[base, method]

    def _load(self, base: str) -> Base:
        with _named_as_clients():
            own = self.context.base
            loaded = load_base(self._model(base), own.task, self.context.seed, precision=own.precision)
            check_padding("distillation", loaded)
            return loaded

    def _model(self, base: str) -> ModelSettings:
        model = self.context.model
        return model if base == model.base else model.model_copy(update={"base": base, "revision": None})

    def _check_context_lengths(self) -> None:
        """Refuse clients' models that are too short for the recipe's texts, before any weight is loaded."""
        data = self.context.data
        wanted = data.max_length + (data.max_target_length if data.task == "generation" else 0)
        for base in self.settings.client_models or []:
            with _named_as_clients():
                limit = context_length(load_configuration(self._model(base)))
            if limit is not None and wanted > limit:
                raise ModelError(
                    f"data.max_length = {data.max_length}: {wanted} positions are needed; {base} of "
                    f"method.client_models has {limit}"
                )


@contextlib.contextmanager
def _named_as_clients() -> Iterator[None]:
    """Errors name the setting that the base comes from."""
    try:
        yield
    except ModelError as error:
        raise ModelError(str(error).replace("model.base", "method.client_models", 1)) from error
