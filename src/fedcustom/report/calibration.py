"""Reliability diagram: accuracy against confidence, by bins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from ..evaluation.calibration import BINS, binned, expected_calibration_error
from . import formatting as words
from .axes import Axis, linear
from .read import Prediction, Run
from .svg import Chart

COUNTS_HEIGHT = 96


@dataclass(frozen=True, slots=True)
class Bin:
    """The examples whose confidence is above ``low`` and at most ``high`` (the first bin includes 0)."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """How far one run's probabilities are to be believed: in a sentence, as charts and bin by bin."""

    verdict: str
    temperature: str
    charts: Markup
    bins: list[Bin]


def calibration(run: Run, predictions: Sequence[Prediction], paint: str) -> Calibration | None:
    """Of a run's predictions; None where none of them has a probability."""
    bins = reliability(predictions)
    filled = [each for each in bins if each.count]
    if not filled:
        return None
    found = run.summary.temperature
    divided = "" if found is None else f"Logits are divided by {found:.3g}, the temperature."
    return Calibration(verdict(bins), divided, reliability_charts(bins, paint), filled)


def reliability(predictions: Sequence[Prediction]) -> list[Bin]:
    """The bins of equal width over 0 to 1 (:func:`fedcustom.evaluation.calibration.binned`); confidence and
    accuracy are means, NaN in empty ones.

    Predictions without a label or a probability are left out.
    """
    known = [
        (line.probability, str(line.label) == str(line.prediction))
        for line in predictions
        if line.label is not None and line.probability is not None
    ]
    confidence, right = np.array([c for c, _ in known]), np.array([r for _, r in known], dtype=float)
    return [
        Bin(
            place / BINS,
            (place + 1) / BINS,
            round(count),
            said / count if count else math.nan,
            true / count if count else math.nan,
        )
        for place, (count, said, true) in enumerate(binned(confidence, right))
    ]


def calibration_error(bins: Sequence[Bin]) -> float:
    """The expected calibration error of bins; NaN without examples."""
    sums = [[each.count, each.count * each.confidence, each.count * each.accuracy] for each in bins]
    return expected_calibration_error([each for each in sums if each[0]])


def verdict(bins: Sequence[Bin]) -> str:
    """What the bins say, in a sentence or two."""
    filled = [each for each in bins if each.count]
    total = sum(each.count for each in filled)
    confidence = sum(each.count * each.confidence for each in filled) / total
    accuracy = sum(each.count * each.accuracy for each in filled) / total
    return (
        f"Expected calibration error {calibration_error(bins):.3f}, over {len(bins)} bins of equal width and "
        f"{words.plural(total, 'test example')}; mean confidence {confidence:.3f}, accuracy {accuracy:.3f}."
    )


def reliability_charts(bins: Sequence[Bin], paint: str) -> Markup:
    """Accuracy by confidence beside the diagonal, and below it how many examples each bin has."""
    shares = linear(0, 1, most=12)
    chart = Chart(shares, linear(0, 1), "", "Accuracy", height=300)
    most = max(each.count for each in bins)
    counts = Chart(
        shares, Axis(0, most), "Confidence (probability of the prediction)", "Examples",
        height=COUNTS_HEIGHT, grid="",
    )  # fmt: skip
    chart.segment((0, 0), (1, 1), "diagonal")
    gap = 0.08 / len(bins)
    for each in bins:
        if not each.count:
            continue
        tip = (
            f"confidence {each.low:.2f} to {each.high:.2f}: {words.plural(each.count, 'example')}, "
            f"mean confidence {each.confidence:.3f}, accuracy {each.accuracy:.3f}"
        )
        chart.box(each.low + gap, each.high - gap, 0, each.accuracy, paint, "bar", tip)
        chart.segment((each.confidence, each.accuracy), (each.confidence, each.confidence), "gap")
        share = 0.82 * each.count / most
        counts.box(each.low + gap, each.high - gap, 0, share, paint, "bar", tip)
        counts.text((each.low + each.high) / 2, share + 0.04, words.count(each.count), "count")
    return chart.html() + counts.html()
