"""The mean of clients' LoRA products from two sketches, both of which add up (FedASK, arXiv 2507.09990).

All clients share a random matrix Omega of (in, s). Of its product ``X_k = B_k A_k`` (out, in) each sends
``X_k Omega``, the server finds an orthonormal basis Q of the mean's columns, each sends ``X_k^T Q``, and
``Q (sum_k w_k X_k^T Q)^T`` is the mean product X, projected on that basis. This is the randomised singular
value decomposition of Halko, Martinsson and Tropp 2011 (algorithms 4.1 and 5.1) on a matrix that nobody has.
It is exact where the rank of X is s at most, as it is where the clients' ranks add up to s.

Scales stay outside: they are the same for all clients. Everything runs in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .lora_factors import LoraFactors, change_norm, compress_lora


def sketch_columns(rank: int, oversampling: int, shape: tuple[int, int]) -> int:
    """s, the columns of a sketch: ``rank + oversampling``, but no more than a matrix of ``shape`` (out, in)
    can have independent ones.
    """
    return min(rank + oversampling, *shape)


def random_sketch(width: int, columns: int, seed: Sequence[int]) -> Tensor:
    """Omega of (``width``, ``columns``), float64: independent N(0, 1 / columns), the same for the same
    ``seed`` everywhere, so that ``||X Omega||^2`` is ``||X||^2`` on average.
    """
    numbers = np.random.default_rng(list(seed)).standard_normal((width, columns))
    return torch.from_numpy(numbers / math.sqrt(columns))


def difference(after: LoraFactors, before: LoraFactors) -> LoraFactors:
    """Factors of ``B_after A_after - B_before A_before``, of the rank of both together; scales are 1."""
    return LoraFactors(torch.cat([after.a, before.a]), torch.cat([after.b, -before.b], 1))


def sketched(factors: LoraFactors, omega: Tensor) -> Tensor:
    """``B (A Omega)`` of (out, s), without the dense product: O((out + in) r s)."""
    return factors.b.double() @ (factors.a.double() @ omega.double())


def sketch_basis(sketch: Tensor) -> Tensor:
    """An orthonormal basis Q of (out, s) of a space that holds the columns of a sketch (out, s), s <= out."""
    basis: Tensor = torch.linalg.qr(sketch.double()).Q
    return basis


def projected(factors: LoraFactors, basis: Tensor) -> Tensor:
    """``A^T (B^T Q)`` of (in, s), without the dense product: O((out + in) r s)."""
    return factors.a.double().T @ (factors.b.double().T @ basis.double())


def factors_of(basis: Tensor, projection: Tensor, rank: int, scale: float) -> LoraFactors:
    """The best approximation of ``Q P^T`` by factors of ``rank`` that are applied with ``scale``: with
    ``Q P^T = U S V^T``, B is ``U sqrt(S)`` and A is ``sqrt(S) V^T``, cut to the largest (float64).

    Args:
        basis: Q, (out, s).
        projection: P, (in, s).
        rank: Of the result; rows and columns beyond the product's rank are zero.
        scale: What the result's product is multiplied by; the decomposed one is without it.
    """
    return compress_lora(LoraFactors(projection.double().T, basis.double(), scale), rank)


def missed_by_basis(sketch: Tensor, shape: tuple[int, int]) -> float:
    """An estimate of ``||X - Q Q^T X||^2``, from a sketch ``X Omega`` (out, s) alone.

    A column of the sketch, projected off the space of all others, is a sample of what a basis of s - 1
    columns misses: the leave-one-out estimator of Epperly and Tropp 2024 (arXiv 2207.06342), unbiased for
    s - 1 columns and so, on average, no less than what s columns miss. 0 where s is the smaller side of
    ``shape`` (out, in): then nothing is missed.

    Costs O(out s^2 + s^4).
    """
    columns = sketch.shape[1]
    if columns >= min(shape):
        return 0.0
    triangle = torch.linalg.qr(sketch.double()).R
    found = 0.0
    for column in range(columns):
        others = torch.linalg.qr(torch.cat([triangle[:, :column], triangle[:, column + 1 :]], 1)).Q
        own = triangle[:, column]
        found += float((own - others @ (others.T @ own)).square().sum())
    return found


def estimated_error(missed: float, whole: Sequence[LoraFactors], kept: Sequence[LoraFactors]) -> float:
    """An estimate of the distance of the merged products from the ideal ones, relative to the ideal, over all
    matrices together: what the bases missed (squared, :func:`missed_by_basis`), and what was cut from
    ``Q P^T`` (``whole``) to the recipe's rank (``kept``), which are orthogonal to each other. Scales are 1.
    """
    projected_size = sum(change_norm(one) ** 2 for one in whole)
    cut = max(0.0, projected_size - sum(change_norm(one) ** 2 for one in kept))
    ideal = projected_size + missed
    return math.sqrt((cut + missed) / ideal) if ideal else 0.0
