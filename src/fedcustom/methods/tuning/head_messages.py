"""Messages of rounds that fit the head, and their checks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...aggregation.discriminant import class_moments
from ...core.errors import UpdateError
from ...core.tensors import Tensors, is_finite
from ..messages import Task, Update, typed
from .head_disclosure import counted_rows, sends_scatter
from .messages import FitHeadTask, HeadGradientTask, HeadGradientUpdate, HeadSumsUpdate, ScaleHeadTask
from .update_checks import check_forms

FIT_HEAD = FitHeadTask.kind
"""The kind of task that asks for a client's sums."""

SCALE_HEAD = ScaleHeadTask.kind
"""The kind of task that asks for the losses of a head at several temperatures."""

HEAD_GRADIENT = HeadGradientTask.kind
"""The kind of task that asks for loss and gradient of a head."""

POINT = "head_point"
"""The tensor of a task that holds a head, (labels, width + 1), biases last."""

LARGEST_SQUARE = 1e8
"""Of a coordinate of the vectors that a head is fitted to, the mean over a client's examples."""

ROUNDING = 1e-5
"""Of the sum of all squares: what float32 sums may lack in a direction."""

MOST_DEVIATIONS = 9.0
"""The largest number that noise has (:class:`~fedcustom.privacy.noise.NoiseKey`), over its deviation."""

TEMPERATURES = tuple(0.02 * 1.25**power for power in range(24))
"""By which the discriminant's logits are tried to be multiplied, 0.02 to 3.4."""


@dataclass
class Sums:
    """What clients' sums add up to. ``counts`` of (labels,) are of all examples, ``sent`` of those in
    ``totals``, sum x of (labels, width). ``scatter`` of (width, width) is sum x x^T over the examples whose
    client sent it, and s s^T / n over sums s of n examples of a label of clients that did not; it has so many
    ``pieces`` (:func:`~fedcustom.aggregation.discriminant.class_moments`).
    """

    counts: Tensor
    sent: Tensor
    totals: Tensor
    scatter: Tensor
    pieces: float = 0.0

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
        return cls(counts, counts.clone(), totals, rows.T @ rows, float(len(rows)))

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add what a client sent."""
        counted, totals = tensors["counted"], tensors["totals"].double()
        present = counted > 0
        self.counts += tensors["counts"]
        self.sent += counted
        self.totals[present] += totals
        if has_scatter(tensors):
            factor = unpacked(tensors["factor"].double(), len(self.scatter))
            self.scatter += factor.T @ factor
            self.pieces += float(counted.sum())
        else:
            self.scatter += (totals.T / counted[present]) @ totals
            self.pieces += float(present.sum())

    def all_scatter(self) -> Tensor:
        """Sum x x^T over all examples in ``totals``: known, or estimated from sums of some of them."""
        number = float(self.sent.sum())
        if self.pieces == number:
            return self.scatter
        means, within = class_moments(self.sent, self.totals, self.scatter, self.pieces)
        return number * within + (means.T * self.sent) @ means


def has_scatter(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a client sent the second moments of its counted rows."""
    return tensors["factor"].numel() > 0


def sums_of(vectors: Tensor, labels: Tensor, texts: Tensor, classes: int, least: int) -> Tensors:
    """What a client sends first: ``counts`` of (labels,), of all its examples; ``counted`` of (labels,), of
    those in its sums (:func:`~.head_disclosure.counted_rows`); ``totals``, of (labels in the sums, width);
    and ``factor``, the rows of R from the diagonal on, or nothing
    (:func:`~.head_disclosure.sends_scatter`).

    ``vectors`` of (examples, width), ``labels`` and ``texts`` of (examples,), which number equal texts alike.
    """
    kept = counted_rows(labels, texts, classes, least)
    own, which = vectors[kept].double(), labels[kept]
    counted = torch.bincount(which, minlength=classes)
    totals = torch.zeros(classes, own.shape[1], dtype=torch.float64).index_add_(0, which, own)
    rows = own if sends_scatter(which, texts[kept], least) else own[:0]
    return {
        "counts": torch.bincount(labels, minlength=classes).int(),
        "counted": counted.int(),
        "totals": totals[counted > 0].float(),
        "factor": packed(torch.linalg.qr(rows, mode="r").R).float(),
    }


def private_sums(vectors: Tensor, labels: Tensor, classes: int) -> Tensors:
    """What is sent with noise: ``counts`` of (classes,) and ``totals`` of (classes, width), the sums of a
    client's vectors divided by their lengths, of every label that it has. A vector that is not finite counts
    as zeros, so that no row moves a total by more than 1.
    """
    rows = torch.nn.functional.normalize(vectors.double(), dim=1)
    rows = torch.where(rows.isfinite().all(dim=1, keepdim=True), rows, 0.0)
    totals = torch.zeros(classes, rows.shape[1], dtype=torch.float64).index_add_(0, labels, rows)
    counts = torch.bincount(labels, minlength=classes)
    return {"counts": counts.float(), "totals": totals.float()}


def check_private_sums(update: Update, classes: int, width: int, *, noised: bool = False) -> None:
    """Refuse what has not the forms of :func:`private_sums`. How large the numbers are is no matter where the
    server bounds them; where they are ``noised`` by the client, so many rows must be able to have given them.

    Raises:
        UpdateError: says what is wrong.
    """
    if not is_finite(update.tensors):
        raise UpdateError("an update holds numbers that are not finite")
    check_forms(update.tensors, {"counts": torch.empty(classes), "totals": torch.empty(classes, width)})
    deviation = typed(update, HeadSumsUpdate).deviation
    if (deviation is not None) != noised:
        raise UpdateError(f"deviation {deviation!r}: sums are {'' if noised else 'not '}noised by the client")
    if deviation is None:
        return
    if not isinstance(deviation, int | float) or not 0 < deviation < math.inf:
        raise UpdateError(f"deviation {deviation!r}: must be above 0")
    number = update.weight
    if not (isinstance(number, int | float) and 0 < number < 1e12 and number == int(number)):
        raise UpdateError(f"weight {number!r} is not the number of examples")
    largest = number + MOST_DEVIATIONS * deviation
    if any(float(tensor.abs().max()) > largest * (1 + ROUNDING) for tensor in update.tensors.values()):
        raise UpdateError(f"sums are larger than those of {number:g} vectors of length 1 with this noise")


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
    counts, counted = (update.tensors.get(name, none) for name in ("counts", "counted"))
    check_forms({"counts": counts, "counted": counted}, {"counts": none, "counted": none})
    counts, counted = counts.double(), counted.double()
    if (counts < 0).any() or float(counts.sum()) != update.weight:
        raise UpdateError(f"weight {update.weight!r} is not the number of examples that counts have")
    if (counted < 0).any() or (counted > counts).any():
        raise UpdateError("counted has more examples of a label than counts have, or fewer than none")
    present = counted > 0
    sent = float(counted.sum())
    wanted = {
        "counts": none,
        "counted": none,
        "totals": torch.empty(int(present.sum()), width),
        "factor": torch.empty(0),
    }
    scattered = "factor" in update.tensors and has_scatter(update.tensors)
    if scattered:
        wanted["factor"] = torch.empty(factor_size(int(min(sent, width)), width))
    check_forms(update.tensors, wanted)
    if not sent:
        return
    totals = update.tensors["totals"].double()
    scatter = None
    if scattered:
        factor = unpacked(update.tensors["factor"].double(), width)
        scatter = factor.T @ factor
    check_moments(counted[present], totals, scatter)


def check_moments(counted: Tensor, totals: Tensor, scatter: Tensor | None) -> None:
    """Refuse sums that no examples can have given, or vectors that are far too large.

    Args:
        counted: Examples of each label, (labels,), of which some may have none.
        totals: Sum x of each label, (labels, width).
        scatter: Sum x x^T over all of them, (width, width); None where it is not known.

    Raises:
        UpdateError: says what is wrong.
    """
    sent, (_, width) = float(counted.sum()), totals.shape
    means = totals / counted.clamp(min=1)[:, None]
    if float((means.square().sum(dim=1) * counted).sum()) > LARGEST_SQUARE * sent * width:
        raise UpdateError(f"the vectors' mean square is above {LARGEST_SQUARE:g}")
    if scatter is None:
        return
    if float(scatter.diagonal().sum()) > LARGEST_SQUARE * sent * width:
        raise UpdateError(f"the vectors' mean square is above {LARGEST_SQUARE:g}")
    within = scatter - (totals.T / counted.clamp(min=1)) @ totals
    slack = ROUNDING * float(scatter.diagonal().sum()) + 1e-9
    _, failed = torch.linalg.cholesky_ex(within + slack * torch.eye(width, dtype=torch.float64))
    if failed:
        raise UpdateError("the scatter is smaller in some direction than the totals allow")


def factor_size(rows: int, width: int) -> int:
    """The numbers of an upper triangular (rows, width)."""
    return rows * width - rows * (rows - 1) // 2


def packed(factor: Tensor) -> Tensor:
    """The numbers of an upper triangular (rows, width) from the diagonal on, row by row."""
    rows, columns = torch.triu_indices(*factor.shape)
    return factor[rows, columns]


def unpacked(numbers: Tensor, width: int) -> Tensor:
    """The upper triangular matrix, (rows, width), of which these are the numbers."""
    rows = 0
    while rows < width and factor_size(rows, width) < len(numbers):
        rows += 1
    places = torch.triu_indices(rows, width)
    matrix = torch.zeros(rows, width, dtype=numbers.dtype)
    matrix[places[0], places[1]] = numbers
    return matrix
