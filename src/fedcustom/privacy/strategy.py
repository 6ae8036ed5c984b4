"""Strategies of correlated noise: later noise takes back a part of earlier noise, so that less is left in
the last state.

The clients' sums of T rounds, X of (T, numbers), are released as X + C^-1 Z with independent Z. That is the
Gaussian mechanism on C X. C is lower triangular and banded Toeplitz with columns of norm 1: contributions of
one client that are as many rounds apart as C has bands touch different rows of C X, so that k of them, each
of norm 1, have sensitivity sqrt(k) (Choquette-Choo et al. 2023, arXiv 2306.08153).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.signal import lfilter

from ..core.tensors import Tensors

MOST_OPTIMISED = 200
"""Rounds up to which the coefficients are optimised; beyond, they are those of the square root."""

Coefficients = tuple[float, ...]
Vector = np.ndarray[tuple[int], np.dtype[np.float64]]


def weights_in_last_state(factors: Sequence[float], momentum: float = 0.0) -> Vector:
    """What the release of each round weighs in the last state, (T,): the schedule's factor of that round,
    times its part of all later steps of a server with momentum.
    """
    total, sums = 0.0, []
    for _ in factors:
        total = 1 + momentum * total
        sums.append(total)
    weights: Vector = np.asarray(factors, dtype=np.float64) * np.asarray(sums[::-1])
    return weights


def banded_toeplitz(weights: Sequence[float] | Vector, bands: int) -> Coefficients:
    """The first column of C, (bands,), of norm 1, that makes the noise in ``sum_t weights_t x_t`` least, as
    far as L-BFGS finds it; beyond :data:`MOST_OPTIMISED` rounds the first ``bands`` coefficients of the
    square root of the matrix of ones (Fichtenberger et al. 2023).

    With w the weights, the noise's variance is ``|w^T C^-1|^2``; its gradient by c_j, at u = C^-T w and
    v = C^-1 u, is ``-2 sum_t v_t u_(t+j)``.

    Raises:
        ValueError: there are no rounds, or fewer than bands.
    """
    w = np.asarray(weights, dtype=np.float64)
    if not 1 <= bands <= len(w):
        raise ValueError(f"{bands} bands of {len(w)} rounds")
    root = square_root(bands)
    if bands == 1 or len(w) > MOST_OPTIMISED or not w.any():
        return _normalised(root)

    def objective(rest: Vector) -> tuple[float, Vector]:
        column = np.concatenate([[1.0], rest])
        u = lfilter([1.0], column, w[::-1])[::-1]
        v = lfilter([1.0], column, u)
        variance, square = float(u @ u), float(column @ column)
        if not math.isfinite(variance):
            return math.inf, np.zeros_like(rest)
        slope = np.array([-2 * float(v[: len(w) - j] @ u[j:]) for j in range(1, bands)])
        return math.log(variance * square), slope / variance + 2 * rest / square

    found = minimize(objective, root[1:], jac=True, method="L-BFGS-B", options={"maxiter": 1000})
    best = found.x if found.fun <= objective(root[1:])[0] else root[1:]
    return _normalised(np.concatenate([[1.0], best]))


def square_root(bands: int) -> Vector:
    """The first coefficients of (1 - x)^(-1/2): 1, 1/2, 3/8, ..."""
    j = np.arange(1, bands, dtype=np.float64)
    return np.concatenate([[1.0], np.cumprod((2 * j - 1) / (2 * j))])


def remaining_noise(weights: Sequence[float] | Vector, coefficients: Sequence[float]) -> float:
    """The standard deviation of ``sum_t weights_t (C^-1 Z)_t`` over that of independent noise: 1 at
    coefficients (1,).
    """
    w = np.asarray(weights, dtype=np.float64)
    u = lfilter([1.0], np.asarray(coefficients, dtype=np.float64), w[::-1])
    length = float(np.linalg.norm(w))
    return float(np.linalg.norm(u)) / length if length else 1.0


class CorrelatedNoise:
    """The rows of C^-1 Z, one after another::

        y_t = (z_t - sum_(j >= 1) c_j y_(t-j)) / c_0

    At most as many rows are held as C has bands. A row that is not the next one is computed from the first
    one again, as after a resume: ``draw`` gives the rows of Z, named tensors in float64, as often as asked.
    Rows are rounded to float32 as they are made, so that they are the same however they were come by.
    """

    def __init__(self, coefficients: Sequence[float], draw: Callable[[int], Tensors]) -> None:
        self.coefficients, self.draw = tuple(coefficients), draw
        self._rows: deque[Tensors] = deque(maxlen=max(1, len(self.coefficients) - 1))
        self._next = 0

    def row(self, number: int) -> Tensors:
        """Row ``number``, counted from 0."""
        if number < self._next:
            self._rows.clear()
            self._next = 0
        while self._next <= number:
            found = self._step(self._next)
            self._next += 1
        return found

    def _step(self, number: int) -> Tensors:
        first, *rest = self.coefficients
        row = dict(self.draw(number))
        for coefficient, earlier in zip(rest, reversed(self._rows), strict=False):
            for name, total in row.items():
                total.sub_(earlier[name], alpha=coefficient)
        row = {name: total.div_(first).to(torch.float32) for name, total in row.items()}
        self._rows.append(row)
        return dict(row)


def _normalised(column: Vector) -> Coefficients:
    return tuple((column / np.linalg.norm(column)).tolist())
