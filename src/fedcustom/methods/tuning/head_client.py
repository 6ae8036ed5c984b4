"""A client's part in fitting the head: its vectors, and the sums, losses and gradients over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...aggregation.logistic import loss_and_gradient
from ...core.errors import RecipeError, UpdateError
from ...core.tensors import Tensors
from ...data.examples import Example
from ...data.tokens import TokenizedExample, by_length
from ...models.forward import classification_logits
from ...models.load import Base
from ...privacy.settings import PrivacySettings
from ...training.settings import TrainingSettings
from ..protocol import Update
from .head_layer import HeadLayer
from .head_messages import LEAST, POINT, TEMPERATURES, private_sums, sums_of
from .head_solution import local_head
from .messages import (
    FitHeadTask,
    HeadGradientUpdate,
    HeadLossesUpdate,
    HeadSumsUpdate,
    HeadTask,
    ScaleHeadTask,
    TrainTask,
)
from .objective import Objective
from .release import clipped_sums
from .technique import TrainableModel


class HeadClient:
    """What a client does in rounds that fit the head (:class:`~.head_fit.HeadFit`).

    ``vectors`` has the vectors and labels of each client until the round is over, ``read`` vectors that were
    computed for several clients at once. Not to be used where the recipe fits no head.
    """

    def __init__(
        self,
        training: TrainingSettings,
        layer: HeadLayer | None,
        trainable: TrainableModel,
        objective: Objective,
        base: Base,
        *,
        batch_size: int = 64,
        privacy: PrivacySettings | None = None,
    ) -> None:
        self.privacy = privacy
        self.training, self.trainable, self.objective, self.base = training, trainable, objective, base
        self.batch_size = batch_size
        self.vectors: dict[str, tuple[Tensor, Tensor]] = {}
        self.read: dict[str, Tensor] = {}
        self.steps: dict[str, int] = {}
        if layer is not None:
            self.layer = layer

    def execute(
        self, task: HeadTask, name: str, examples: Sequence[Example], tokens: Sequence[TokenizedExample]
    ) -> Update:
        """A client's answer to a task about the head; for the first the model holds the state.

        Raises:
            UpdateError: its vectors are gone, since its process was started anew within the round; or more
                steps are asked for than the recipe says.
        """
        number = float(len(examples))
        if isinstance(task, FitHeadTask):
            labels = torch.tensor([example.label for example in examples])
            vectors = self.read.pop(name) if name in self.read else self.inputs(tokens)
            if self.privacy is not None:  # nothing follows: the vectors are not kept
                sums = private_sums(vectors, labels, self.layer.classes)
                return HeadSumsUpdate(clipped_sums(sums, self.privacy), number)
            self.vectors[name], self.steps[name] = (vectors, labels), 0
            return HeadSumsUpdate(sums_of(vectors, labels, self.layer.classes), number)
        if name not in self.vectors:
            raise UpdateError("the vectors of this round are gone: this client was started anew")
        self.steps[name] += 1
        if self.steps[name] > self.training.fit_head_steps + 1:
            raise UpdateError(
                f"more steps were asked for than training.fit_head_steps = {self.training.fit_head_steps}"
            )
        vectors, labels = self.vectors[name]
        if len(labels) < LEAST:  # nothing of a single example
            vectors, labels = vectors[:0], labels[:0]
        point = task.tensors[POINT]
        if isinstance(task, ScaleHeadTask):
            logits = vectors.double() @ point[:, :-1].double().T + point[:, -1].double()
            losses = [
                float(functional.cross_entropy(scale * logits, labels, reduction="sum"))
                for scale in TEMPERATURES
            ]
            return HeadLossesUpdate({"losses": torch.tensor(losses)}, float(len(labels)))
        loss, gradient = loss_and_gradient(point, vectors, labels)
        return HeadGradientUpdate({"gradient": gradient.float()}, float(len(labels)), objective=loss)

    def forget(self) -> None:
        """Drop the clients' vectors: the model changes."""
        self.vectors.clear()
        self.read.clear()

    def inputs(self, tokens: Sequence[TokenizedExample]) -> Tensor:
        """What goes into the head's last layer for each example in the model as it is, (examples, width)."""
        model, width = self.trainable.model, self.layer.width
        found = torch.zeros(len(tokens), width)
        noted: list[Tensor] = []

        def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            vectors = arguments[0].detach().float().cpu()
            if vectors.shape != (vectors.shape[0], width):
                raise RecipeError(f"training.fit_head_rounds: {self.base.name} has no head on one vector")
            noted.append(vectors)

        model.eval()
        hook = self.layer.module.register_forward_pre_hook(note)
        try:
            # Compiled code would not see the hook, or would keep it.
            with torch.compiler.set_stance("force_eager"), torch.no_grad():
                for positions in by_length(tokens, self.batch_size, equal=self.base.padding == "none"):
                    batch = self.objective.collate([tokens[i] for i in positions])
                    with self.base.autocast():
                        classification_logits(model, batch)
                    found[positions] = noted.pop()
        finally:
            hook.remove()
        return found

    def alone(self, name: str) -> Tensors:
        """The head of a client that keeps everything to itself; its vectors are dropped."""
        return local_head(self.layer, *self.vectors.pop(name), self.training)

    def label_counts(self, task: TrainTask) -> tuple[int, ...] | None:
        """What a task says of the labels of all clients; None before the head was first fitted.

        Raises:
            UpdateError: they are not counts of these labels.
        """
        counts = task.label_counts
        if counts is None:
            return None
        if (
            not isinstance(counts, tuple)
            or len(counts) != self.layer.classes
            or any(type(count) is not int or not 0 <= count < 2**53 for count in counts)
        ):
            raise UpdateError(f"label_counts {counts!r}: must be {self.layer.classes} whole numbers from 0")
        return counts
