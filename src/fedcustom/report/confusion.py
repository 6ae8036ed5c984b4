"""Confusion table: all labels, or the most frequent confusions of many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .read import Prediction

LARGEST_MATRIX = 20
"""With more labels than this, single confusions are listed instead of all pairs of labels."""
MOST_PAIRS = 15


@dataclass(frozen=True, slots=True)
class MatrixEntry:
    """How often a label was predicted as another, and its share of the label's examples."""

    count: int
    share: float


@dataclass(frozen=True, slots=True)
class Matrix:
    """All labels by all labels: a row is a label, a column what was predicted."""

    labels: list[str]
    rows: list[tuple[str, list[MatrixEntry]]]


@dataclass(frozen=True, slots=True)
class Pair:
    """A label that was predicted as another one, how often, and the share of the label's examples."""

    label: str
    predicted: str
    count: int
    share: float


@dataclass(frozen=True, slots=True)
class Confusions:
    """Either a matrix or pairs, and of how many examples how many were wrong."""

    total: int
    wrong: int
    matrix: Matrix | None
    pairs: list[Pair]
    kinds: int
    """How many different pairs were confused."""


def confusions(predictions: Sequence[Prediction], order: Sequence[str]) -> Confusions | None:
    """What was taken for what; None where no prediction has a label.

    Labels stand in the given order, and others behind them by name. Pairs stand by how often they were
    confused, equals by the share of their label, then by name.
    """
    counts = Counter(
        (str(line.label), str(line.prediction)) for line in predictions if line.label is not None
    )
    if not counts:
        return None
    frequency: Counter[str] = Counter()
    for (label, _), number in counts.items():
        frequency[label] += number
    present = {name for pair in counts for name in pair}
    labels = [name for name in dict.fromkeys([*order, *sorted(present)]) if name in present]

    def cell(label: str, predicted: str) -> MatrixEntry:
        number = counts[label, predicted]
        return MatrixEntry(number, number / max(1, frequency[label]))

    matrix = None
    if len(labels) <= LARGEST_MATRIX:
        rows = [(label, [cell(label, predicted) for predicted in labels]) for label in labels]
        matrix = Matrix(labels, rows)
    pairs = [
        Pair(label, predicted, number, number / frequency[label])
        for (label, predicted), number in counts.items()
        if label != predicted
    ]
    pairs.sort(key=lambda pair: (-pair.count, -pair.share, pair.label, pair.predicted))
    return Confusions(
        total=sum(counts.values()),
        wrong=sum(pair.count for pair in pairs),
        matrix=matrix,
        pairs=[] if matrix else pairs[:MOST_PAIRS],
        kinds=len(pairs),
    )
