"""Linear discriminant analysis from sums, which add up over clients."""

from __future__ import annotations

import torch
from torch import Tensor


def class_moments(
    counts: Tensor, totals: Tensor, scatter: Tensor, pieces: float | None = None
) -> tuple[Tensor, Tensor]:
    """Means of the classes, (classes, width), and the covariance within them, (width, width), in float64.

    ``counts`` n_c of (classes,), ``totals`` sum x of (classes, width), ``scatter`` sum x x^T of (width,
    width) over all classes::

        m_c = totals_c / n_c,   S = (scatter - sum_c n_c m_c m_c^T) / (n - C)

    with C the number of classes that have examples. One that has none gets the mean of all examples.

    Where of some examples only sums are known, s_j over n_j examples of one class, ``scatter`` holds
    s_j s_j^T / n_j in place of their x x^T, which has the same expectation about the mean as that of a single
    example: n is then the number of ``pieces``, sums and single examples together.
    """
    counts, totals, scatter = counts.double(), totals.double(), scatter.double()
    present = counts > 0
    everywhere = totals.sum(dim=0) / counts.sum()
    means = torch.where(present[:, None], totals / counts.clamp(min=1)[:, None], everywhere)
    pieces = float(counts.sum()) if pieces is None else pieces
    degrees = max(1.0, pieces - int(present.sum()))
    return means, (scatter - (means.T * counts) @ means) / degrees


def discriminant(means: Tensor, within: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """The linear discriminants of classes with one covariance (Fisher 1936): ``logits = x W^T + b``::

        W_c = S^-1 m_c,   b_c = - m_c^T S^-1 m_c / 2 + log(share_c)

    ``means`` of (classes, width), ``within`` S of (width, width), ``shares`` of (classes,); returns W of
    (classes, width) and b of (classes,).

    Raises:
        RuntimeError: the covariance has no inverse.
    """
    weight = torch.linalg.solve(within, means.T).T
    return weight, -0.5 * (weight * means).sum(dim=1) + torch.log(shares)


def shrunk(within: Tensor, examples: float) -> Tensor:
    """A covariance of (width, width), estimated from so many ``examples``, drawn towards its mean variance v.

    ``(1 - s) S + s v I`` with the s that has the least expected error for Gaussian examples, known from S
    alone (OAS, Chen et al. 2010, eq. 23)::

        s = min(1, (a + v^2) / ((n + 1) (a - v^2 / width))),   v = trace(S) / width,  a = mean of S's squares
    """
    width = len(within)
    v = float(within.diagonal().mean())
    a = float(within.square().mean())
    spread = (examples + 1) * (a - v * v / width)
    share = 1.0 if spread <= 0 else min(1.0, (a + v * v) / spread)
    return (1 - share) * within + share * v * torch.eye(width, dtype=within.dtype)
