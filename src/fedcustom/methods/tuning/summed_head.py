"""Figures of which a head is fitted where the server is shown sums over clients alone (secure sums): what
they are, how large they can be, and which labels take part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.errors import UpdateError
from ...core.tensors import is_finite
from ..messages import Task, Update
from ..protocol import FigureForm
from .head_messages import TEMPERATURES, factor_size
from .messages import CountLabelsTask, SumGradientsTask, SumLossesTask, SumNoisedTask, SumVectorsTask

LONGEST = 2.0**12
"""Length of a vector that is summed; a longer one is shortened to it, and counted."""

LARGEST_LOSS = 2.0**20
"""Nats: the most that the sum of a client's losses has for each example."""

LARGEST_NOISED = 2.0**32
"""The largest size of a noised number, of all clients together."""

SLACK = 1.001
"""Of a bound: room for rounding in floating point."""

MOST_NEEDED = 2**20

NEEDED = (*range(1, 8), *(2**power * part for power in range(1, 18) for part in (4, 5, 6, 7)), MOST_NEEDED)
"""How many examples of a label all clients must have together: the numbers that a client may ask for, at
most a quarter apart. The last one stands for more than that too, and no label has enough then.
"""

NEVER = 2**53 - 1
"""More examples than there are."""


@dataclass(frozen=True)
class SumTerms:
    """What a client asks of sums over clients: so many ``owners`` of a label; and, of its own examples alone,
    ``alone`` different texts of a label, whatever the others have (1: what all have together decides).
    """

    owners: int = 3
    alone: int = 1


def needed_place(wanted: int) -> int:
    """The place in :data:`NEEDED` of the least number that is at least as large."""
    return next((place for place, number in enumerate(NEEDED) if number >= wanted), len(NEEDED) - 1)


def wanted_examples(labels: Tensor, texts: Tensor, least: int) -> dict[int, int]:
    """How many examples of each of its labels a client wants all clients to have together, so that none of
    its own texts is more than one in ``least`` of them. ``labels`` and ``texts`` of (rows,) are its rows'
    labels and numbers that are equal for equal texts.
    """
    found = {}
    for label in sorted(set(labels.tolist())):
        repeated = int(torch.bincount(texts[labels == label]).max())
        found[label] = 1 if least == 1 else least * repeated
    return found


def repeats_of(wanted: Mapping[int, int], classes: int) -> Tensor:
    """What a client tells of that: a 1 for each of its labels at the place of the number, (labels,
    numbers).
    """
    repeats = torch.zeros(classes, len(NEEDED), dtype=torch.int64)
    for label, number in wanted.items():
        repeats[label, needed_place(number)] = 1
    return repeats


@dataclass(frozen=True)
class LabelTotals:
    """What all clients have of each label, in order: ``counted`` examples that may take part, of which there
    must be ``needed``, and so many ``owners`` among the clients.
    """

    counted: tuple[int, ...]
    needed: tuple[int, ...]
    owners: tuple[int, ...]

    @classmethod
    def of(cls, counted: Tensor, repeats: Tensor) -> LabelTotals:
        """From sums over clients: ``counted`` of (labels,), and how many clients ask for each number of
        :data:`NEEDED`, ``repeats`` of (labels, numbers).
        """
        needed = []
        for row in repeats.tolist():
            last = max((place for place, clients in enumerate(row) if clients), default=0)
            needed.append(NEVER if last == len(NEEDED) - 1 else NEEDED[last])
        return cls(tuple(counted.tolist()), tuple(needed), tuple(repeats.sum(dim=1).tolist()))

    @classmethod
    def told(cls, task: SumVectorsTask) -> LabelTotals:
        """As the server tells them."""
        return cls(task.counted, task.needed, task.owners)

    def admitted(self, least_owners: int) -> Tensor:
        """Which labels take part, (labels,): of which enough clients have examples, and these enough."""
        return torch.tensor(
            [
                owners >= least_owners and counted >= needed
                for counted, needed, owners in zip(self.counted, self.needed, self.owners, strict=True)
            ],
            dtype=torch.bool,
        )

    def examples(self, least_owners: int) -> int:
        """How many examples take part."""
        admitted = self.admitted(least_owners).tolist()
        return sum(number for number, taken in zip(self.counted, admitted, strict=True) if taken)


def figure_forms(task: Task, classes: int, width: int, least_owners: int) -> dict[str, FigureForm] | None:
    """The forms of what answers a task; None for one of another kind.

    Raises:
        UpdateError: the totals of a task are not of these labels.
    """
    if isinstance(task, CountLabelsTask):
        return {
            "counts": FigureForm((classes,)),
            "counted": FigureForm((classes,)),
            "repeats": FigureForm((classes, len(NEEDED))),
        }
    if isinstance(task, SumNoisedTask):
        return {
            "counts": FigureForm((classes,), LARGEST_NOISED),
            "totals": FigureForm((classes, width), LARGEST_NOISED),
            "variance": FigureForm((1,), LARGEST_NOISED),
        }
    if isinstance(task, SumVectorsTask):
        for told in (task.counted, task.needed, task.owners):
            if len(told) != classes:
                raise UpdateError(f"a task tells totals of {len(told)} labels; there are {classes}")
        totals = LabelTotals.told(task)
        labels, examples = int(totals.admitted(least_owners).sum()), totals.examples(least_owners)
        return {
            "counted": FigureForm((classes,)),
            "pieces": FigureForm((1,)),
            "shortened": FigureForm((1,)),
            "totals": FigureForm((labels, width), _bound(examples, LONGEST)),
            "scatter": FigureForm((factor_size(width, width),), _bound(examples, LONGEST**2)),
        }
    if isinstance(task, SumLossesTask):
        return {
            "cut": FigureForm((1,)),
            "losses": FigureForm((len(TEMPERATURES),), _bound(task.examples, LARGEST_LOSS)),
        }
    if isinstance(task, SumGradientsTask):
        return {
            "counted": FigureForm((classes,)),
            "cut": FigureForm((1,)),
            "loss": FigureForm((1,), _bound(task.examples, LARGEST_LOSS)),
            "gradient": FigureForm((classes, width + 1), _bound(task.examples, LONGEST)),
        }
    return None


def check_figures(update: Update, forms: Mapping[str, FigureForm]) -> None:
    """Refuse figures of other forms, numbers that are not finite, and whole numbers below 0; of one client,
    or of all together.

    Raises:
        UpdateError: names the tensor.
    """
    if update.tensors.keys() != forms.keys():
        names = sorted(update.tensors.keys() ^ forms.keys())
        raise UpdateError(f"wrong tensor names: {', '.join(names[:3])}")
    if not is_finite(update.tensors):
        raise UpdateError("an update holds numbers that are not finite")
    for name, form in forms.items():
        tensor, dtype = update.tensors[name], torch.int64 if form.bound is None else torch.float64
        if tuple(tensor.shape) != form.shape or tensor.dtype != dtype:
            raise UpdateError(
                f"{name} is {tuple(tensor.shape)} numbers of {tensor.dtype}, not {form.shape} of {dtype}"
            )
        if form.bound is None and (tensor < 0).any():
            raise UpdateError(f"{name} has numbers below 0")


def spread_labels(rows: Tensor, admitted: Tensor) -> Tensor:
    """Rows of the labels that are ``admitted``, (labels there, width), as rows of all, (labels, width)."""
    found = torch.zeros(len(admitted), rows.shape[1], dtype=rows.dtype)
    found[admitted] = rows
    return found


def shortened(vectors: Tensor) -> tuple[Tensor, int]:
    """Vectors, (rows, width), of which none is longer than :data:`LONGEST`, and how many were. One that is
    not finite becomes zeros, and counts.
    """
    finite = vectors.isfinite().all(dim=1, keepdim=True)
    vectors = torch.where(finite, vectors, 0.0)
    lengths: Tensor = torch.linalg.vector_norm(vectors.double(), dim=1, keepdim=True)
    long = lengths > LONGEST
    factors = torch.where(long, LONGEST / lengths.clamp(min=1.0), 1.0).to(vectors.dtype)
    return vectors * factors, int((long | ~finite).sum())


def cut_losses(losses: Sequence[float], examples: int) -> tuple[list[float], int]:
    """Sums of losses of so many examples, none above what may be summed, and how many were."""
    most = examples * LARGEST_LOSS
    return [loss if loss <= most else most for loss in losses], sum(not loss <= most for loss in losses)


def _bound(examples: int, size: float) -> float:
    return SLACK * max(1, examples) * size
