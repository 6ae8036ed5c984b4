"""Rules that hold although some clients send what they like.

Most of them give each client's change a coefficient that depends only on the changes' inner products, so
they are written as functions of the K x K Gram matrix; what that measures (plain tensors, or the matrices B A
that LoRA factors stand for) is the caller's choice. The combined change is ``sum_k coefficient_k change_k``.
None of them believes the number of examples that a client claims.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..core.tensors import Tensors


def inner_products(changes: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """The Gram matrix of changes with the same names and shapes: (K, K), float64."""
    gram = torch.zeros(len(changes), len(changes), dtype=torch.float64)
    for name in changes[0]:
        rows = torch.stack([change[name].reshape(-1) for change in changes]).double()
        gram += (rows @ rows.T).cpu()
    return gram


def distances(gram: Tensor, coefficients: Tensor | None = None) -> Tensor:
    """Euclidean distances between all changes, (K, K), or to the combination with ``coefficients``, (K)."""
    squares = gram.diagonal()
    if coefficients is None:
        return (squares[:, None] + squares[None, :] - 2 * gram).clamp(min=0).sqrt()
    return (squares - 2 * gram @ coefficients + coefficients @ gram @ coefficients).clamp(min=0).sqrt()


def byzantine_count(clients: int, fraction: float) -> int:
    """How many of ``clients`` are taken to be hostile: the fraction, rounded up."""
    return math.ceil(fraction * clients - 1e-9)


def krum(gram: Tensor, byzantine: int, chosen: int = 1) -> Tensor:
    """Krum, and Multi-Krum with ``chosen`` > 1 (Blanchard et al. 2017, section 4).

    A change's score is the sum of its squared distances to its K - f - 2 nearest others (at least one); the
    ``chosen`` best scored ones are averaged. Returns coefficients (K).
    """
    count = len(gram)
    squared = distances(gram) ** 2
    squared.fill_diagonal_(math.inf)
    nearest = max(1, min(count - byzantine - 2, count - 1))
    if count == 1:
        return torch.ones(1, dtype=torch.float64)
    scores = squared.sort(dim=1).values[:, :nearest].sum(dim=1)
    coefficients = torch.zeros(count, dtype=torch.float64)
    coefficients[scores.argsort(stable=True)[:chosen]] = 1 / min(chosen, count)
    return coefficients


def geometric_median(gram: Tensor, iterations: int = 100, smoothing: float = 1e-6) -> Tensor:
    """The point with the smallest sum of distances, by smoothed Weiszfeld steps (RFA, Pillutla et al. 2022).

    The steps start at the mean of the half of the changes that lie nearest to one another, so that changes of
    any finite size among the others neither move the start nor set the scale. ``smoothing`` is relative to
    the median distance of the start. Returns coefficients (K).
    """
    coefficients = _mean_of_nearest_half(gram)
    floor = None
    for _ in range(iterations):
        away = distances(gram, coefficients)
        floor = floor or max(smoothing * float(away.median()), 1e-30)
        following = 1 / away.clamp(min=floor)
        following /= following.sum()
        moved, coefficients = float((following - coefficients).abs().max()), following
        if moved < 1e-9:
            break
    return coefficients


def _mean_of_nearest_half(gram: Tensor) -> Tensor:
    """Coefficients of the mean of K // 2 + 1 changes: one and those nearest to it, such that the farthest of
    them is as near as can be.
    """
    count = len(gram)
    half = count // 2 + 1
    away, order = distances(gram).sort(dim=1, stable=True)
    centre = int(away[:, half - 1].argmin())
    coefficients = torch.zeros(count, dtype=torch.float64)
    coefficients[order[centre, :half]] = 1 / half
    return coefficients


def norm_bounding(gram: Tensor, bound: float | None) -> Tensor:
    """The mean of changes shortened to a norm of at most ``bound`` (Sun et al. 2019); unset: the median norm.

    Returns coefficients (K).
    """
    norms = gram.diagonal().clamp(min=0).sqrt()
    limit = float(norms.median()) if bound is None else bound
    return (limit / norms.clamp(min=1e-30)).clamp(max=1.0) / len(gram)


def centred_clipping(gram: Tensor, radius: float | None, iterations: int = 5) -> Tensor:
    """Centred clipping (Karimireddy et al. 2021, equation 3), started at no change::

        v <- v + 1/K sum_k (x_k - v) min(1, radius / |x_k - v|)

    ``radius`` unset: the median norm of the changes. Returns coefficients (K).
    """
    count = len(gram)
    limit = float(gram.diagonal().clamp(min=0).sqrt().median()) if radius is None else radius
    coefficients = torch.zeros(count, dtype=torch.float64)
    for _ in range(iterations):
        pull = (limit / distances(gram, coefficients).clamp(min=1e-30)).clamp(max=1.0) / count
        coefficients = coefficients * (1 - pull.sum()) + pull
    return coefficients


def fltrust(gram: Tensor) -> Tensor:
    """FLTrust (Cao et al. 2021, algorithm 2): trust is the cosine with the server's own change, if positive.

    The server's change is the first of the Gram matrix. Clients' changes are brought to its norm. Returns
    coefficients (K) with 0 for the server; all are 0 where nobody is trusted.
    """
    norms = gram.diagonal().clamp(min=1e-60).sqrt()
    trust = (gram[0] / (norms[0] * norms)).clamp(min=0)
    trust[0] = 0
    total = trust.sum()
    return trust * norms[0] / norms / total if total > 0 else torch.zeros_like(trust)


def coordinate_median(changes: Sequence[Mapping[str, Tensor]]) -> Tensors:
    """The median of every number (Yin et al. 2018); of an even count, the mean of the middle two."""
    return trimmed_mean(changes, (len(changes) - 1) // 2)


def trimmed_mean(changes: Sequence[Mapping[str, Tensor]], trimmed: int) -> Tensors:
    """The mean of every number without the ``trimmed`` largest and smallest (Yin et al. 2018).

    Raises:
        ValueError: nothing is left.
    """
    if 2 * trimmed >= len(changes):
        raise ValueError(f"trimming {trimmed} on each side leaves nothing of {len(changes)} changes")
    result = {}
    for name in changes[0]:
        ordered = torch.stack([change[name] for change in changes]).sort(dim=0).values
        result[name] = ordered[trimmed : len(changes) - trimmed].mean(dim=0)
    return result
