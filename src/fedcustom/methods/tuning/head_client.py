"""A client's part in fitting the head: its vectors, and the sums, losses and gradients over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...aggregation.logistic import loss_and_gradient, probabilities
from ...core.errors import RecipeError, UpdateError
from ...core.tensors import Tensors
from ...data.examples import Example
from ...data.tokens import TokenizedExample, by_length
from ...models.forward import classification_logits
from ...models.load import Base
from ...privacy.example_mechanism import ExamplePrivacy
from ...privacy.settings import PrivacySettings
from ...training.settings import TrainingSettings
from ..messages import Update
from ..protocol import Memory
from .head_disclosure import counted_rows, sends_gradient, text_numbers
from .head_layer import HeadLayer
from .head_messages import POINT, TEMPERATURES, private_sums, sums_of
from .head_solution import local_head
from .hidden_rows import noised_sums
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
from .summed_head import SumTerms
from .technique import TrainableModel


@dataclass(frozen=True)
class Rows:
    """A client's examples that take part in a fit: ``vectors`` of (rows, width), ``labels`` of (rows,) and
    ``texts`` of (rows,), which number equal texts alike.
    """

    vectors: Tensor
    labels: Tensor
    texts: Tensor

    def only(self, kept: Tensor) -> Rows:
        """Those of a mask of (rows,)."""
        return Rows(self.vectors[kept], self.labels[kept], self.texts[kept])

    def none(self) -> Rows:
        """No row of these."""
        return self.only(torch.zeros(len(self.labels), dtype=torch.bool))


class HeadClient:
    """What a client does in rounds that fit the head (:class:`~.head_fit.HeadFit`).

    ``rows`` has the rows of each client that take part until the round is over, ``read`` vectors that were
    computed for several clients at once, ``earlier`` the probabilities of a client's rows at the heads
    whose gradients it sent. With ``least`` different texts of a label these take part
    (:mod:`~.head_disclosure`); all else enters nothing but the label counts. Not to be used where the recipe
    fits no head.
    """

    def __init__(
        self,
        training: TrainingSettings,
        layer: HeadLayer | None,
        trainable: TrainableModel,
        objective: Objective,
        base: Base,
        *,
        least: int,
        batch_size: int = 64,
        privacy: PrivacySettings | None = None,
        row_privacy: ExamplePrivacy | None = None,
        terms: SumTerms | None = None,
    ) -> None:
        self.terms = terms or SumTerms()
        self.least, self.privacy, self.row_privacy = least, privacy, row_privacy
        self.training, self.trainable, self.objective, self.base = training, trainable, objective, base
        self.batch_size = batch_size
        self.rows: dict[str, Rows] = {}
        self.read: dict[str, Tensor] = {}
        self.steps: dict[str, int] = {}
        self.earlier: dict[str, list[Tensor]] = {}
        if layer is not None:
            self.layer = layer

    def execute(
        self,
        task: HeadTask,
        name: str,
        examples: Sequence[Example],
        tokens: Sequence[TokenizedExample],
        memory: Memory,
    ) -> Update:
        """A client's answer to a task about the head; for the first the model holds the state. The client's
        memory counts noised sums.

        Raises:
            UpdateError: its vectors are gone, since its process was started anew within the round; or more
                steps, or noised sums, are asked for than the recipe says.
        """
        number = float(len(examples))
        if isinstance(task, FitHeadTask):
            labels = torch.tensor([example.label for example in examples])
            vectors = self.read.pop(name) if name in self.read else self.inputs(tokens)
            if self.row_privacy is not None:  # nothing follows: the vectors are not kept
                sums = private_sums(vectors, labels, self.layer.classes)
                noised, deviation = noised_sums(
                    self.row_privacy, name, len(examples), sums, memory, task.round_number
                )
                return HeadSumsUpdate(noised, number, deviation=deviation)
            if self.privacy is not None:
                sums = private_sums(vectors, labels, self.layer.classes)
                return HeadSumsUpdate(clipped_sums(sums, self.privacy), number)
            texts, classes = text_numbers(tokens), self.layer.classes
            kept = counted_rows(labels, texts, classes, self.least)
            self.rows[name] = Rows(vectors, labels, texts).only(kept)
            self.steps[name], self.earlier[name] = 0, []
            return HeadSumsUpdate(sums_of(vectors, labels, texts, classes, self.least), number)
        if name not in self.rows:
            raise UpdateError("the vectors of this round are gone: this client was started anew")
        self.steps[name] += 1
        if self.steps[name] > self.training.fit_head_steps + 1:
            raise UpdateError(
                f"more steps were asked for than training.fit_head_steps = {self.training.fit_head_steps}"
            )
        rows, point = self.rows[name], task.tensors[POINT]
        if isinstance(task, ScaleHeadTask):
            logits = rows.vectors.double() @ point[:, :-1].double().T + point[:, -1].double()
            losses = [
                float(functional.cross_entropy(scale * logits, rows.labels, reduction="sum"))
                for scale in TEMPERATURES
            ]
            return HeadLossesUpdate({"losses": torch.tensor(losses)}, float(len(rows.labels)))
        if len(rows.labels) and self.least > 1:
            found, earlier = probabilities(point, rows.vectors), self.earlier[name]
            if sends_gradient(found, rows.labels, rows.texts, self.least, earlier):
                earlier.append(found)
            else:
                rows = self.rows[name] = rows.none()  # for the rest of the round
        loss, gradient = loss_and_gradient(point, rows.vectors, rows.labels)
        return HeadGradientUpdate({"gradient": gradient.float()}, float(len(rows.labels)), objective=loss)

    def forget(self) -> None:
        """Drop the clients' vectors: the model changes."""
        self.rows.clear()
        self.earlier.clear()
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
        rows = self.rows.pop(name)
        return local_head(self.layer, rows.vectors, rows.labels, self.training)

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
