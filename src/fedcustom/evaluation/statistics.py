"""What a site tells of its examples instead of showing them: counts and sums, from which metrics of all
sites' examples together are exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import torch

from ..core.errors import UpdateError
from .calibration import BINS, SCALES, best_scale, expected_calibration_error, reliability, tempered_losses
from .metrics import Metrics
from .settings import CHOICE_METRIC, SHARES

Statistics = dict[str, Any]

LARGEST_SCORE = 100.0
"""Of one example's text, in any metric but the loss (:func:`~.metrics.text_metrics`)."""

SIGNED = frozenset({"reward_margin"})
"""Metrics that may be below 0, of any size."""

MOST_TOKENS = 2**20
"""Of one example's target, over which its loss is summed."""


def classification_statistics(scores: np.ndarray[Any, Any], labels: Sequence[int]) -> Statistics:
    """Of logits ``(examples, labels)``: how often each label was taken for each (``confusion``, true label by
    predicted one), the sum of losses in nats, as they are and with logits at several temperatures
    (``tempered``), and how confident predictions are and how often right (``bins``; see
    :mod:`.calibration`). Discloses how many examples of each label there are.
    """
    size = scores.shape[1]
    confusion = np.zeros((size, size), dtype=int)
    np.add.at(confusion, (np.asarray(labels, dtype=int), scores.argmax(axis=1)), 1)
    loss = torch.nn.functional.cross_entropy(
        torch.from_numpy(scores), torch.tensor(labels, dtype=torch.long), reduction="sum"
    )
    return {
        "examples": len(labels),
        "confusion": confusion.tolist(),
        "loss": float(loss),
        "bins": reliability(scores, labels),
        "tempered": tempered_losses(scores, labels),
    }


def mean_statistics(metrics: Metrics, counts: Mapping[str, int], examples: int) -> Statistics:
    """Of means, each over as many things as ``counts`` says or else over the examples: sums and counts."""
    sums = {
        name: [value * counts.get(name, examples), counts.get(name, examples)]
        for name, value in metrics.items()
    }
    return {"examples": examples, "sums": sums}


def pooled_metrics(parts: Sequence[Statistics]) -> Metrics:
    """The metrics of all sites' examples together: accuracy, macro-F1 and loss of a classifier as
    :func:`~.metrics.classification_metrics` gives them; of anything else the means, each over the sites that
    have the metric.
    """
    if "confusion" not in parts[0]:
        names = dict.fromkeys(name for part in parts for name in part["sums"])
        summed = {name: [part["sums"][name] for part in parts if name in part["sums"]] for name in names}
        return {name: math.fsum(s for s, _ in of) / sum(n for _, n in of) for name, of in summed.items()}
    total = sum(int(part["examples"]) for part in parts)
    confusion = np.sum([np.asarray(part["confusion"]) for part in parts], axis=0)
    right, true, said = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    occurring = (true + said) > 0
    f1 = 2 * right[occurring] / (true + said)[occurring]
    return {
        "accuracy": float(right.sum() / total),
        "macro_f1": float(f1.mean()),
        "loss": math.fsum(part["loss"] for part in parts) / total,
        "calibration_error": expected_calibration_error(
            np.sum([part["bins"] for part in parts], axis=0).tolist()
        ),
    }


def pooled_scale(parts: Sequence[Statistics]) -> float:
    """What a classifier's logits are best multiplied by, for all sites' examples together."""
    return best_scale(np.sum([part["tempered"] for part in parts], axis=0).tolist())


def check_statistics(part: Mapping[str, Any], labels: int) -> Statistics:
    """A site's statistics, if they are sound.

    Raises:
        UpdateError: they are not what :func:`classification_statistics` or :func:`mean_statistics` gives.
    """
    count = part.get("examples")
    if type(count) is not int or not 0 < count < 2**40:
        raise UpdateError(f"statistics of {count!r} examples")
    if labels:
        confusion: Any = part.get("confusion")
        loss = part.get("loss")
        if not _is_confusion(confusion, labels) or sum(sum(row) for row in confusion) != count:
            raise UpdateError("statistics: the counts of labels are not sound")
        if not is_number(loss) or loss < 0:
            raise UpdateError("statistics: the loss is not a finite number from 0")
        bins: Any = part.get("bins")
        tempered: Any = part.get("tempered")
        if not (_is_row(tempered, len(SCALES)) and min(tempered) >= 0):
            raise UpdateError("statistics: the losses at several temperatures are not sound")
        if not (isinstance(bins, list) and len(bins) == BINS and all(_is_row(each, 3) for each in bins)):
            raise UpdateError("statistics: the bins of confidence are not sound")
        if not all(min(each) >= 0 and max(each) <= each[0] for each in bins) or (
            sum(each[0] for each in bins) != count
        ):
            raise UpdateError("statistics: the bins of confidence are not those of the examples")
        return {
            "examples": count,
            "confusion": confusion,
            "loss": float(loss),
            "bins": bins,
            "tempered": tempered,
        }
    sums = part.get("sums")
    if not isinstance(sums, dict) or not all(_is_sum(v, signed=k in SIGNED) for k, v in sums.items()):
        raise UpdateError("statistics: the sums are not finite numbers from 0 with their counts")
    for name, (total, number) in sums.items():
        if name == "loss":
            continue
        most = 1.0 if name in SHARES else LARGEST_SCORE
        too_large = name not in SIGNED and total > most * number * (1 + 1e-9)
        some = 0 < number <= count if name == CHOICE_METRIC else number == count  # not all may have options
        if too_large or not some:
            raise UpdateError(f"statistics: {name} is no sum of the examples' scores")
    if "loss" in sums and sums["loss"][1] > MOST_TOKENS * count:
        raise UpdateError("statistics: the loss is of more tokens than the examples can have")
    return {"examples": count, "sums": {str(name): value for name, value in sums.items()}}


def is_number(value: Any) -> TypeGuard[float]:
    """Whether something is a finite number that a float can hold."""
    return isinstance(value, int | float) and -1e300 < value < 1e300


def _is_row(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length and all(is_number(each) for each in value)


def _is_sum(value: Any, *, signed: bool) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and is_number(value[0])
        and (signed or value[0] >= 0)
        and type(value[1]) is int
        and 0 < value[1] < 2**50
    )


def _is_confusion(value: Any, labels: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == labels
        and all(isinstance(row, list) and len(row) == labels for row in value)
        and all(type(number) is int and 0 <= number < 2**40 for row in value for number in row)
    )
