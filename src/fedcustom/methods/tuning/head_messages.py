"""Messages of rounds that fit the head, and their checks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.errors import UpdateError
from ...core.tensors import Tensors, is_finite
from ..protocol import Task, Update, typed
from .messages import FitHeadTask, HeadGradientTask, HeadGradientUpdate, ScaleHeadTask
from .update_checks import check_forms

FIT_HEAD = FitHeadTask.kind
"""The kind of task that asks for a client's sums."""

SCALE_HEAD = ScaleHeadTask.kind
"""The kind of task that asks for the losses of a head at several temperatures."""

HEAD_GRADIENT = HeadGradientTask.kind
"""The kind of task that asks for loss and gradient of a head."""

POINT = "head_point"
"""The tensor of a task that holds a head, (labels, width + 1), biases last."""

LEAST = 2
"""Examples of a label that a client must have for their sum to be sent: the sum of one would be that one."""

LARGEST_SQUARE = 1e8
"""Of a coordinate of the vectors that a head is fitted to, the mean over a client's examples."""

ROUNDING = 1e-5
"""Of the sum of all squares: what float32 sums may lack in a direction."""

TEMPERATURES = tuple(0.02 * 1.25**power for power in range(24))
"""By which the discriminant's logits are tried to be multiplied, 0.02 to 3.4."""


@dataclass
class Sums:
    """What clients' sums add up to. ``counts`` of (labels,) are of all examples, ``sent`` of those in
    ``totals``, sum x of (labels, width), and ``scatter``, sum x x^T of (width, width).
    """

    counts: Tensor
    sent: Tensor
    totals: Tensor
    scatter: Tensor

    @classmethod
    def zero(cls, labels: int, width: int) -> Sums:
        """Of nobody."""
        counts = torch.zeros(labels, dtype=torch.float64)
        totals = torch.zeros(labels, width, dtype=torch.float64)
        return cls(counts, counts.clone(), totals, torch.zeros(width, width, dtype=torch.float64))

    @classmethod
    def of(cls, vectors: Tensor, labels: Tensor, classes: int) -> Sums:
        """Of all these examples, which is for the eyes of their owner alone."""
        rows = vectors.double()
        counts = torch.bincount(labels, minlength=classes).double()
        totals = torch.zeros(classes, rows.shape[1], dtype=torch.float64).index_add_(0, labels, rows)
        return cls(counts, counts.clone(), totals, rows.T @ rows)

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add what a client sent."""
        counts, width = tensors["counts"], len(self.scatter)
        present = counts >= LEAST
        self.counts += counts
        self.sent += torch.where(present, counts, 0)
        self.totals[present] += tensors["totals"].double()
        factor = unpacked(tensors["factor"].double(), width)
        self.scatter += factor.T @ factor


def sums_of(vectors: Tensor, labels: Tensor, classes: int) -> Tensors:
    """What a client sends first: ``counts`` of (labels,); ``totals``, of (labels of which it has
    :data:`LEAST` examples, width); and ``factor``, the rows of R from the diagonal on.
    """
    counts = torch.bincount(labels, minlength=classes)
    present = counts >= LEAST
    kept = present[labels]
    own, which = vectors[kept].double(), labels[kept]
    totals = torch.zeros(len(counts), own.shape[1], dtype=torch.float64).index_add_(0, which, own)
    return {
        "counts": counts.int(),
        "totals": totals[present].float(),
        "factor": packed(torch.linalg.qr(own, mode="r").R).float(),
    }


def private_sums(vectors: Tensor, labels: Tensor, classes: int) -> Tensors:
    """What a client sends where a trusted server adds noise: ``counts`` of (classes,) and ``totals`` of
    (classes, width), the sums of its vectors divided by their lengths, of every label that it has.
    """
    rows = torch.nn.functional.normalize(vectors.double(), dim=1)
    totals = torch.zeros(classes, rows.shape[1], dtype=torch.float64).index_add_(0, labels, rows)
    counts = torch.bincount(labels, minlength=classes)
    return {"counts": counts.float(), "totals": totals.float()}


def check_private_sums(update: Update, classes: int, width: int) -> None:
    """Refuse what has not the forms of :func:`private_sums`; how large the numbers are is no matter.

    Raises:
        UpdateError: says what is wrong.
    """
    if not is_finite(update.tensors):
        raise UpdateError("an update holds numbers that are not finite")
    check_forms(update.tensors, {"counts": torch.empty(classes), "totals": torch.empty(classes, width)})


def check_answer(task: Task, update: Update, classes: int, width: int) -> None:
    """Refuse what no examples can have given as an answer to a task of which the head is fitted.

    Raises:
        UpdateError: says what is wrong.
    """
    if not is_finite(update.tensors):
        raise UpdateError("an update holds numbers that are not finite")
    number = update.weight
    if not (isinstance(number, int | float) and 0 <= number < 1e12 and number == int(number)):
        raise UpdateError(f"weight {number!r} is not the number of examples")
    if isinstance(task, ScaleHeadTask):
        check_forms(update.tensors, {"losses": torch.empty(len(TEMPERATURES))})
        if (update.tensors["losses"] < 0).any():
            raise UpdateError("losses below 0")
    elif isinstance(task, HeadGradientTask):
        check_forms(update.tensors, {"gradient": torch.empty(classes, width + 1)})
        loss = typed(update, HeadGradientUpdate).objective
        if not isinstance(loss, int | float) or not 0 <= loss < 1e300:
            raise UpdateError(f"objective {loss!r} is not a sum of losses")
        # Of an example, a label's probability less the truth, at most 1, times its vector (see _check_sums).
        gradient = update.tensors["gradient"].abs()
        largest = number * math.sqrt(LARGEST_SQUARE * width)
        if (gradient[:, -1] > 1.001 * number + 1e-3).any() or (gradient > 1.001 * largest + 1e-3).any():
            raise UpdateError(f"a gradient larger than {number:g} examples can have")
    else:
        _check_sums(update, classes, width)


def _check_sums(update: Update, classes: int, width: int) -> None:
    """Refuse what cannot be a client's first sums."""
    none = torch.zeros(classes, dtype=torch.int32)
    counts = update.tensors.get("counts", none)
    check_forms({"counts": counts}, {"counts": none})
    counts = counts.double()
    if (counts < 0).any() or float(counts.sum()) != update.weight:
        raise UpdateError(f"weight {update.weight!r} is not the number of examples that counts have")
    present = counts >= LEAST
    sent = float(counts[present].sum())
    rows = int(min(sent, width))
    wanted = {
        "counts": none,
        "totals": torch.empty(int(present.sum()), width),
        "factor": torch.empty(rows * width - rows * (rows - 1) // 2),
    }
    check_forms(update.tensors, wanted)
    if not sent:
        return
    totals, factor = update.tensors["totals"].double(), unpacked(update.tensors["factor"].double(), width)
    scatter = factor.T @ factor
    if float(scatter.diagonal().sum()) > LARGEST_SQUARE * sent * width:
        raise UpdateError(f"the vectors' mean square is above {LARGEST_SQUARE:g}")
    within = scatter - (totals.T / counts[present]) @ totals
    slack = ROUNDING * float(scatter.diagonal().sum()) + 1e-9
    _, failed = torch.linalg.cholesky_ex(within + slack * torch.eye(width, dtype=torch.float64))
    if failed:
        raise UpdateError("the scatter is smaller in some direction than the totals allow")


def packed(factor: Tensor) -> Tensor:
    """The numbers of an upper triangular (rows, width) from the diagonal on, row by row."""
    rows, columns = torch.triu_indices(*factor.shape)
    return factor[rows, columns]


def unpacked(numbers: Tensor, width: int) -> Tensor:
    """The upper triangular matrix, (rows, width), of which these are the numbers."""
    rows = 0
    while rows < width and rows * width - rows * (rows - 1) // 2 < len(numbers):
        rows += 1
    places = torch.triu_indices(rows, width)
    matrix = torch.zeros(rows, width, dtype=numbers.dtype)
    matrix[places[0], places[1]] = numbers
    return matrix
