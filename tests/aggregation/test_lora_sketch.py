"""The mean of LoRA products from two sketches, against the dense mean in NumPy float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from fedcustom.aggregation.lora import LoraUpdate, truncated_lora
from fedcustom.aggregation.lora_factors import LoraFactors
from fedcustom.aggregation.lora_sketch import (
    difference,
    estimated_error,
    factors_of,
    missed_by_basis,
    projected,
    random_sketch,
    sketch_basis,
    sketch_columns,
    sketched,
)

OUT, IN = 30, 22
WEIGHTS = (0.5, 0.3, 0.2)


def clients(rank: int, shape: tuple[int, int] = (OUT, IN), seed: int = 0) -> list[LoraFactors]:
    generator = torch.Generator().manual_seed(seed)
    return [
        LoraFactors(
            torch.randn(rank, shape[1], generator=generator), torch.randn(shape[0], rank, generator=generator)
        )
        for _ in WEIGHTS
    ]


def dense(found: Sequence[LoraFactors]) -> np.ndarray:
    total = np.zeros((found[0].b.shape[0], found[0].a.shape[1]))
    for one, weight in zip(found, WEIGHTS, strict=True):
        total += weight * (one.b.double().numpy() @ one.a.double().numpy())
    return total


def mean(parts: Sequence[Tensor]) -> Tensor:
    return sum((w * p for w, p in zip(WEIGHTS, parts, strict=True)), torch.zeros(()))


def merged(found: Sequence[LoraFactors], columns: int, rank: int, seed: int = 1) -> tuple[Tensor, ...]:
    """The factors' product, and on the way the sketch and the basis."""
    omega = random_sketch(found[0].a.shape[1], columns, [seed])
    sketch = mean([sketched(one, omega) for one in found])
    basis = sketch_basis(sketch)
    projection = mean([projected(one, basis) for one in found])
    best = factors_of(basis, projection, rank, 1.0)
    return best.b @ best.a, sketch, basis, projection


@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT), (8, 40), (40, 8)])
@pytest.mark.parametrize(("own", "rank"), [(2, 6), (2, 3)])
def test_exact_where_the_sketch_has_as_many_columns_as_the_mean_has_rank(
    shape: tuple[int, int], own: int, rank: int
) -> None:
    """Three clients of rank 2 make a mean of rank 6: with six columns it is the best approximation."""
    found = clients(own, shape)
    product, sketch, *_ = merged(found, sketch_columns(rank, 6 - rank, shape), rank)
    u, values, v = np.linalg.svd(dense(found))
    wanted = (u[:, :rank] * values[:rank]) @ v[:rank]
    np.testing.assert_allclose(product.numpy(), wanted, rtol=0, atol=1e-9 * values[0])
    updates = [LoraUpdate(str(w), one, w) for one, w in zip(found, WEIGHTS, strict=True)]
    torch.testing.assert_close(
        product.float(), truncated_lora(updates, rank, 1.0).change(), rtol=1e-5, atol=1e-5 * float(values[0])
    )
    assert missed_by_basis(sketch, shape) >= 0


def test_factors_share_singular_values() -> None:
    found = clients(2)
    _, _, basis, projection = merged(found, 6, 6)
    best = factors_of(basis, projection, 4, 2.0)
    values = np.linalg.svd(dense(found), compute_uv=False)[:4]
    np.testing.assert_allclose((best.b.T @ best.b).numpy(), np.diag(values), atol=1e-9 * values[0])
    np.testing.assert_allclose((best.a @ best.a.T).numpy(), np.diag(values), atol=1e-9 * values[0])
    assert best.scale == 2.0


def test_differences_add_up_to_the_mean() -> None:
    """What travels: the mean of differences from a common product is the mean less that."""
    found, (start, *_) = clients(2), clients(3, seed=5)
    omega = random_sketch(IN, 7, [3])
    moved = mean([sketched(difference(one, start), omega) for one in found])
    wanted = (dense(found) - start.b.double().numpy() @ start.a.double().numpy()) @ omega.numpy()
    np.testing.assert_allclose(moved.numpy(), wanted, atol=1e-9)


def test_the_estimate_of_what_a_basis_misses() -> None:
    """On average over random sketches it is what bases of one column less miss, and the error by it is near
    the true one.
    """
    found, columns, rank = clients(6), 9, 4
    x = dense(found)
    told, true, errors = [], [], []
    for seed in range(300):
        product, sketch, basis, projection = merged(found, columns, rank, seed)
        missed = missed_by_basis(sketch, (OUT, IN))
        told.append(missed)
        smaller = sketch_basis(sketch[:, 1:]).numpy()
        true.append(np.square(x - smaller @ (smaller.T @ x)).sum())
        kept = factors_of(basis, projection, rank, 1.0)
        error = estimated_error(missed, [LoraFactors(projection.T, basis)], [kept])
        errors.append(error / (np.linalg.norm(product.numpy() - x) / np.linalg.norm(x)))
    assert np.mean(told) == pytest.approx(np.mean(true), rel=0.03)
    assert 0.99 < np.mean(errors) < 1.05
    assert min(errors) > 0.8
    assert max(errors) < 1.4


def test_nothing_is_missed_where_columns_suffice() -> None:
    found = clients(2)
    x = dense(found)
    _, sketch, basis, projection = merged(found, 9, 6)
    assert missed_by_basis(sketch, (OUT, IN)) < 1e-20 * np.square(x).sum()
    whole = [LoraFactors(projection.T, basis)]
    assert estimated_error(0.0, whole, [factors_of(basis, projection, 6, 1.0)]) < 1e-7
    assert missed_by_basis(sketch[:, :9], (OUT, 9)) == 0.0
    assert estimated_error(0.0, [], []) == 0.0


def test_the_random_matrix_is_shared_and_keeps_lengths() -> None:
    one, same, other = (random_sketch(IN, 8, seed) for seed in ([1, 2], [1, 2], [1, 3]))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    (x, *_) = clients(3)
    sizes = [float(sketched(x, random_sketch(IN, 8, [n])).square().sum()) for n in range(400)]
    assert np.mean(sizes) == pytest.approx(float((x.b.double() @ x.a.double()).square().sum()), rel=0.05)
    assert sketch_columns(4, 8, (100, 50)) == 12
    assert sketch_columns(4, 8, (100, 5)) == 5


def test_a_mean_of_zero_has_factors_of_zero() -> None:
    zero = LoraFactors(torch.randn(2, IN), torch.zeros(OUT, 2))
    product, sketch, *_ = merged([zero] * 3, 5, 2)
    assert not product.any()
    assert missed_by_basis(sketch, (OUT, IN)) == 0.0
    assert math.isfinite(estimated_error(0.0, [zero], [zero]))
