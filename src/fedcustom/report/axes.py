"""Ranges and ticks of axes: wide enough that a small difference looks small."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .groups import PERCENT_METRICS, UNBOUNDED_METRICS, lower_is_better

LEAST_SHARE = 0.1
"""The least part of a bounded metric's whole range that an axis shows."""
LEAST_LOSS, LEAST_OF_LOSS = 0.1, 0.25
"""The least that an axis of a loss shows: this much, and this part of the largest value."""
MARGIN = 0.04
"""What is left free at each end, as a part of what is shown."""


@dataclass(frozen=True, slots=True)
class Tick:
    """A tick's place on its axis, from 0 to 1, and what stands there."""

    place: float
    text: str


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis from ``low`` to ``high``, with its ticks."""

    low: float
    high: float
    ticks: tuple[Tick, ...] = ()
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Where a value stands, from 0 at the low end to 1 at the high one."""
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = (math.log10(number) for number in (low, high, value))
        return (value - low) / (high - low)


def limits(metric: str) -> tuple[float, float]:
    """The least and the largest value that a metric can have."""
    if metric in ("clients_asked", "calibration_error"):
        return 0.0, 1.0
    if lower_is_better(metric):
        return 0.0, math.inf
    if metric in UNBOUNDED_METRICS:
        return -math.inf, math.inf
    return 0.0, 100.0 if metric in PERCENT_METRICS else 1.0


def value_range(values: Sequence[float], metric: str, halves: Sequence[float] = ()) -> tuple[float, float]:
    """The range of an axis that shows some values of a metric.

    Args:
        values: At least one; those that are not finite are left out.
        metric: What they are values of. A bounded metric's axis covers a tenth of its whole range at least,
            a loss's a quarter of its largest value; neither leaves the values that the metric can have.
        halves: Half widths of the values' intervals (NaN where there is none). They widen the range by up to
            a quarter at each end: with two seeds they can be so wide that all curves would look flat.
    """
    shown = np.asarray(values, dtype=float)
    half = np.nan_to_num(np.asarray(halves, dtype=float)) if len(halves) else np.zeros(len(shown))
    half, shown = half[np.isfinite(shown)], shown[np.isfinite(shown)]
    low, high = (float(shown.min()), float(shown.max())) if len(shown) else (0.0, 0.0)
    span = high - low
    floor, ceiling = limits(metric)
    least = LEAST_SHARE * ceiling if math.isfinite(ceiling) else max(LEAST_LOSS, LEAST_OF_LOSS * abs(high))
    if len(shown):
        reserve = 0.25 * max(span, least)
        low = max(float((shown - half).min()), low - reserve)
        high = min(float((shown + half).max()), high + reserve)
    span = max(high - low, least) * (1 + 2 * MARGIN)
    middle = (low + high) / 2
    low, high = middle - span / 2, middle + span / 2
    if low < floor:
        low, high = floor, max(high, min(floor + least, ceiling))
    if high > ceiling:
        low, high = max(floor, min(low, ceiling - least)), ceiling
    return low, high


def round_numbers(low: float, high: float, most: int = 8) -> list[float]:
    """Round numbers between two ends: multiples of 1, 2 or 5 times a power of ten, ``most`` at most."""
    rough = (high - low) / max(1, most - 2)
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]


def linear(low: float, high: float, write: Callable[[float], str] | None = None, most: int = 8) -> Axis:
    """A linear axis with round numbers; ``write`` makes their texts (default: with the decimals needed)."""
    numbers = round_numbers(low, high, most)
    decimals = _decimals(numbers)
    write = write or (lambda number: f"{number:.{decimals}f}")
    ticks = tuple(Tick((number - low) / (high - low), write(number)) for number in numbers)
    return Axis(low, high, ticks)


def whole(high: int) -> Axis:
    """An axis of whole numbers from 0."""
    high = max(1, high)
    step = 1 if high <= 12 else next(s for s in _steps() if high / s <= 8)
    return Axis(0, high, tuple(Tick(n / high, str(n)) for n in range(0, high + 1, step)))


def logarithmic(low: float, high: float, write: Callable[[float], str]) -> Axis:
    """A logarithmic axis between two positive numbers, with ticks at powers of ten."""
    start, end = math.log10(low), math.log10(high)
    margin = MARGIN * (end - start)
    start, end = start - margin, end + margin
    powers = range(math.ceil(start), math.floor(end) + 1)
    ticks = tuple(Tick((power - start) / (end - start), write(10.0**power)) for power in powers)
    return Axis(10**start, 10**end, ticks, logarithmic=True)


def _steps() -> Sequence[int]:
    return [factor * 10**power for power in range(10) for factor in (1, 2, 5)]


def _decimals(numbers: Sequence[float]) -> int:
    texts = [f"{number:.10f}".rstrip("0") for number in numbers]
    return max((len(text.partition(".")[2]) for text in texts), default=0)
