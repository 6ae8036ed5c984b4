"""A client's part in fitting the head where the server is shown sums over clients alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ...aggregation.logistic import loss_and_gradient, probabilities
from ...core.errors import UpdateError
from ...data.examples import Example
from ...data.tokens import TokenizedExample
from ..messages import Update
from ..protocol import Memory
from .head_client import HeadClient, Rows
from .head_disclosure import counted_rows, sends_gradient, sends_scatter, text_numbers
from .head_messages import POINT, TEMPERATURES, packed, private_sums
from .hidden_rows import noised_sums
from .messages import (
    CountLabelsTask,
    GradientSumsUpdate,
    HeadTask,
    LabelCountsUpdate,
    LossSumsUpdate,
    NoisedSumsUpdate,
    SumGradientsTask,
    SumLossesTask,
    SumNoisedTask,
    SumVectorsTask,
    VectorSumsUpdate,
)
from .summed_head import (
    NEEDED,
    NEVER,
    LabelTotals,
    cut_losses,
    needed_place,
    repeats_of,
    shortened,
    wanted_examples,
)


class SummedHeadClient(HeadClient):
    """A client of :class:`~.summed_head_fit.SummedHeadFit`. With ``least`` it asks that all clients together
    have so many examples of a label for each time that one of its own texts repeats.

    All figures are computed in float64.
    """

    def execute(
        self,
        task: HeadTask,
        name: str,
        examples: Sequence[Example],
        tokens: Sequence[TokenizedExample],
        memory: Memory,
    ) -> Update:
        """A client's part of a sum; for the first the model holds the state.

        Raises:
            UpdateError: its vectors are gone; more steps are asked for than the recipe says; or the totals
                that it is told are less than its own part.
        """
        if isinstance(task, SumNoisedTask) != (self.row_privacy is not None):
            raise UpdateError(f"the task {task.kind!r} does not go with the recipe's privacy.unit")
        if isinstance(task, SumNoisedTask):
            return self._noised(task, name, examples, tokens, memory)
        if isinstance(task, CountLabelsTask):
            return self._counts(name, examples, tokens)
        if name not in self.rows:
            raise UpdateError("the vectors of this round are gone: this client was started anew")
        if isinstance(task, SumVectorsTask):
            return self._vectors(task, name)
        rows, point = self.rows[name], task.tensors.get(POINT, torch.zeros(0))
        if point.shape != (self.layer.classes, self.layer.width + 1):
            raise UpdateError(f"{POINT} has shape {tuple(point.shape)}")
        if isinstance(task, SumLossesTask):
            logits = rows.vectors.double() @ point[:, :-1].double().T + point[:, -1].double()
            found = [
                float(functional.cross_entropy(scale * logits, rows.labels, reduction="sum"))
                for scale in TEMPERATURES
            ]
            losses, cut = cut_losses(found, len(rows.labels))
            tensors = {"losses": torch.tensor(losses, dtype=torch.float64), "cut": _whole(cut)}
            return LossSumsUpdate(tensors, float(len(rows.labels)))
        if not isinstance(task, SumGradientsTask):
            raise UpdateError(f"the task {task.kind!r} is none of a run with secure sums")
        if task.step > self.training.fit_head_steps:
            raise UpdateError(
                f"step {task.step}: training.fit_head_steps = {self.training.fit_head_steps} says how many "
                "there are"
            )
        return self._gradient(name, point)

    def _counts(
        self, name: str, examples: Sequence[Example], tokens: Sequence[TokenizedExample]
    ) -> LabelCountsUpdate:
        """Numbers by label, of all examples and of those that may take part."""
        classes, labels = self.layer.classes, torch.tensor([example.label for example in examples])
        vectors = self.read.pop(name) if name in self.read else self.inputs(tokens)
        texts = text_numbers(tokens)
        rows = Rows(vectors, labels, texts).only(counted_rows(labels, texts, classes, self.terms.alone))
        self.rows[name], self.earlier[name] = rows, []
        return LabelCountsUpdate(
            {
                "counts": torch.bincount(labels, minlength=classes),
                "counted": torch.bincount(rows.labels, minlength=classes),
                "repeats": repeats_of(wanted_examples(rows.labels, rows.texts, self.least), classes),
            },
            float(len(labels)),
        )

    def _noised(
        self,
        task: SumNoisedTask,
        name: str,
        examples: Sequence[Example],
        tokens: Sequence[TokenizedExample],
        memory: Memory,
    ) -> NoisedSumsUpdate:
        """Noised sums; nothing follows, so that the vectors are not kept."""
        assert self.row_privacy is not None
        vectors = self.read.pop(name) if name in self.read else self.inputs(tokens)
        labels = torch.tensor([example.label for example in examples])
        sums = private_sums(vectors, labels, self.layer.classes)
        number = len(examples)
        noised, deviation = noised_sums(self.row_privacy, name, number, sums, memory, task.round_number)
        figures = {key: tensor.double() for key, tensor in noised.items()}
        figures["variance"] = torch.tensor([deviation**2], dtype=torch.float64)
        return NoisedSumsUpdate(figures, float(number))

    def _vectors(self, task: SumVectorsTask, name: str) -> VectorSumsUpdate:
        """Sums over the vectors of labels that are common enough; the others take part no more."""
        totals, rows, classes = LabelTotals.told(task), self.rows[name], self.layer.classes
        own = torch.bincount(rows.labels, minlength=classes).tolist()
        for label, wanted in wanted_examples(rows.labels, rows.texts, self.least).items():
            place = needed_place(wanted)
            least = NEVER if place == len(NEEDED) - 1 else NEEDED[place]
            if totals.counted[label] < own[label] or totals.needed[label] < least or not totals.owners[label]:
                raise UpdateError(
                    f"label {label}: the totals that the server tells are less than this client's own part"
                )
        admitted = totals.admitted(self.terms.owners)
        rows = rows.only(admitted[rows.labels])
        vectors, long = shortened(rows.vectors)
        self.rows[name] = rows = Rows(vectors, rows.labels, rows.texts)
        counted = torch.bincount(rows.labels, minlength=classes)
        each = vectors.double()
        sums = torch.zeros(classes, self.layer.width, dtype=torch.float64).index_add_(0, rows.labels, each)
        if sends_scatter(rows.labels, rows.texts, self.terms.alone):
            scatter, pieces = each.T @ each, len(rows.labels)
        else:
            present = counted > 0
            scatter = (sums[present].T / counted[present]) @ sums[present]
            pieces = int(present.sum())
        return VectorSumsUpdate(
            {
                "counted": counted,
                "pieces": _whole(pieces),
                "shortened": _whole(long),
                "totals": sums[admitted],
                "scatter": packed(scatter),
            },
            float(len(rows.labels)),
        )

    def _gradient(self, name: str, point: Tensor) -> GradientSumsUpdate:
        """A head's gradient; zeros from the first one on in which one of its texts would stand out, where the
        client goes by its own examples alone.
        """
        rows, earlier = self.rows[name], self.earlier[name]
        if len(rows.labels) and self.terms.alone > 1:
            found = probabilities(point, rows.vectors)
            if sends_gradient(found, rows.labels, rows.texts, self.terms.alone, earlier):
                earlier.append(found)
            else:
                rows = self.rows[name] = rows.none()  # for the rest of the round
        loss, gradient = loss_and_gradient(point, rows.vectors, rows.labels)
        (loss,), cut = cut_losses([loss], len(rows.labels))
        return GradientSumsUpdate(
            {
                "counted": torch.bincount(rows.labels, minlength=self.layer.classes),
                "cut": _whole(cut),
                "loss": torch.tensor([loss], dtype=torch.float64),
                "gradient": gradient,
            },
            float(len(rows.labels)),
        )


def _whole(number: int) -> Tensor:
    return torch.tensor([number], dtype=torch.int64)
