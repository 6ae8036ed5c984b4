"""LoRA aggregation rules against dense sums in NumPy float64, and on real layers."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedcustom.aggregation.lora import (
    LoraUpdate,
    aggregation_error,
    lora_inner_products,
    padded_lora,
    residual_lora,
    stacked_lora,
    truncated_lora,
)
from fedcustom.aggregation.lora_factors import (
    LoraFactors,
    change_norm,
    compress_lora,
    frozen_bases,
    in_rows_of,
    layer_layout,
    orthonormal_rows,
    pad_rank,
    refactored,
    truncate_rank,
    with_scale,
)
from fedcustom.aggregation.mean import weighted_mean

ALPHA = 16.0
OUT, IN = 12, 9


def make(
    ranks: Sequence[int],
    weights: Sequence[float] | None = None,
    *,
    shape: tuple[int, int] = (OUT, IN),
    seed: int = 0,
    scales: Sequence[float] | None = None,
) -> list[LoraUpdate]:
    """Clients with normal factors in float32, scale alpha / rank and unequal weights."""
    generator = torch.Generator().manual_seed(seed)
    out, in_ = shape
    return [
        LoraUpdate(
            f"c{k}",
            LoraFactors(
                torch.randn(rank, in_, generator=generator),
                torch.randn(out, rank, generator=generator),
                scales[k] if scales else ALPHA / rank,
            ),
            weights[k] if weights else 1.0 + 2.5 * k,
        )
        for k, rank in enumerate(ranks)
    ]


def dense(update: LoraUpdate) -> np.ndarray:
    """One client's change, entry by entry as the definition says."""
    a, b = update.factors.a.double().numpy(), update.factors.b.double().numpy()
    return update.factors.scale * np.einsum("or,ri->oi", b, a)


def shares(updates: Sequence[LoraUpdate]) -> np.ndarray:
    weights = np.array([update.weight for update in updates])
    return weights / weights.sum()


def reference(updates: Sequence[LoraUpdate]) -> np.ndarray:
    """sum_k w_k s_k B_k A_k in float64."""
    return sum(w * dense(update) for w, update in zip(shares(updates), updates, strict=True))


def distance(found: Tensor | np.ndarray, wanted: np.ndarray) -> float:
    """Relative Frobenius distance."""
    return float(np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted))


@st.composite
def clients(draw: Any, equal_ranks: bool = False) -> list[LoraUpdate]:
    count = draw(st.integers(1, 5))
    shape = draw(st.integers(2, 10)), draw(st.integers(2, 10))
    ranks = draw(st.lists(st.integers(1, 6), min_size=count, max_size=count))
    ranks = ranks[:1] * count if equal_ranks else ranks
    weights = draw(st.lists(st.floats(0.01, 1000), min_size=count, max_size=count))
    return make(ranks, weights, shape=shape, seed=draw(st.integers(0, 10**6)))


# Every rule that claims exactness: the whole change that it makes, from clients it allows.
def by_stacking(updates: list[LoraUpdate]) -> Tensor:
    return stacked_lora(updates, 2.0).change()


def by_residual(updates: list[LoraUpdate]) -> Tensor:
    merged, residual = residual_lora(updates)
    return merged.change() + residual


def by_full_rank_truncation(updates: list[LoraUpdate]) -> Tensor:
    return truncated_lora(updates, sum(update.factors.rank for update in updates), 0.5).change()


def by_shared_factor(name: str) -> Callable[[list[LoraUpdate]], Tensor]:
    def rule(updates: list[LoraUpdate]) -> Tensor:
        return residual_lora(share(updates, name))[0].change()  # the means of A and of B alone

    return rule


def share(updates: list[LoraUpdate], name: str) -> list[LoraUpdate]:
    """All clients with the first one's A (FFA-LoRA) or B."""
    shared = {name: getattr(updates[0].factors, name)}
    return [replace(update, factors=replace(update.factors, **shared)) for update in updates]


MIXED, EQUAL = [2, 4, 1, 8], [4, 4, 4, 4]
EXACT = {
    "flora": (by_stacking, make(MIXED)),
    "flexlora of full rank": (by_full_rank_truncation, make(MIXED)),
    "fedex": (by_residual, make(EQUAL)),
    "ffa, shared a": (by_shared_factor("a"), share(make(EQUAL), "a")),
    "rolora, shared b": (by_shared_factor("b"), share(make(EQUAL), "b")),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv1d"])
def test_exact_rules_on_layers(name: str, conv: bool) -> None:
    rule, updates = EXACT[name]
    torch.manual_seed(1)
    layer = Conv1D(OUT, IN) if conv else nn.Linear(IN, OUT)
    nn.init.normal_(layer.weight, std=0.1)
    change = reference(updates)
    wanted = layer.weight.detach().double().numpy() + (change.T if conv else change)
    x = torch.randn(5, IN)
    outputs = x.double().numpy() @ (wanted if conv else wanted.T) + layer.bias.detach().double().numpy()

    with torch.no_grad():
        layer.weight += layer_layout(rule(updates), conv)
        assert distance(layer.weight, wanted) < 1e-5
        assert distance(layer(x), outputs) < 1e-5


@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv1d"])
def test_factors_mean_what_peft_means(conv: bool) -> None:
    """PEFT merges each client's factors into the layer; the weighted mean of those weights is the ideal."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(2)
    model = nn.Sequential(Conv1D(OUT, IN) if conv else nn.Linear(IN, OUT))
    base = model[0].weight.detach().double().numpy().copy()
    updates = make(MIXED)
    merged = []
    for update in updates:
        config = LoraConfig(
            r=update.factors.rank,
            lora_alpha=ALPHA,  # type: ignore[arg-type]
            target_modules=["0"],
            fan_in_fan_out=conv,
        )
        layer: Any = inject_adapter_in_model(config, deepcopy(model))[0]
        layer.lora_A["default"].weight.data = update.factors.a
        layer.lora_B["default"].weight.data = update.factors.b
        layer.merge()
        merged.append(layer.base_layer.weight.detach().double().numpy())
    wanted = np.average(merged, axis=0, weights=[update.weight for update in updates])
    assert distance(base + layer_layout(by_stacking(updates), conv).numpy(), wanted) < 1e-5


def test_stacking_by_hand() -> None:
    one = LoraFactors(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [0.0], [3.0]]), 2.0)
    two = LoraFactors(torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), 0.5)
    change = stacked_lora([LoraUpdate("one", one, 1.0), LoraUpdate("two", two, 3.0)], 1.0).change()
    # 1/4 * 2 * [[1, 2], [0, 0], [3, 6]] + 3/4 * 1/2 * [[1, 0], [0, 1], [0, 0]]
    assert torch.equal(change, torch.tensor([[0.875, 1.0], [0.0, 0.375], [1.5, 3.0]]))


@given(clients())
@settings(max_examples=30, deadline=None)
def test_rules_for_mixed_ranks_are_exact(updates: list[LoraUpdate]) -> None:
    wanted = reference(updates)
    stack = stacked_lora(updates, 3.0)
    assert stack.rank == sum(update.factors.rank for update in updates)
    assert stack.scale == 3.0
    for found in (stack.change(), by_full_rank_truncation(updates)):
        assert found.dtype == torch.float32
        assert distance(found, wanted) < 1e-5


@given(clients(equal_ranks=True))
@settings(max_examples=30, deadline=None)
def test_means_of_factors_miss_their_covariance(updates: list[LoraUpdate]) -> None:
    merged, residual = residual_lora(updates)
    w = shares(updates)
    a = np.stack([update.factors.a.double().numpy() for update in updates])
    b = np.stack([update.factors.b.double().numpy() for update in updates])
    mean_a, mean_b = np.average(a, axis=0, weights=w), np.average(b, axis=0, weights=w)
    scale = updates[0].factors.scale
    np.testing.assert_allclose(merged.a, mean_a, atol=1e-5)
    np.testing.assert_allclose(merged.b, mean_b, atol=1e-5)
    covariance = scale * np.einsum("k,kor,kri->oi", w, b - mean_b, a - mean_a)
    wanted = reference(updates)
    size = np.linalg.norm(wanted)
    assert np.linalg.norm(residual.double().numpy() - covariance) < 2e-5 * size
    assert distance(merged.change() + residual, wanted) < 1e-5
    error = aggregation_error([(merged.change(), torch.from_numpy(wanted))])
    assert error == pytest.approx(np.linalg.norm(covariance) / size, rel=1e-3, abs=1e-5)
    if len(updates) > 1 and w.max() < 0.9:
        assert error > 1e-3


def test_residual_makes_up_for_rounded_means() -> None:
    updates = [replace(update, factors=update.factors.to(torch.bfloat16)) for update in make(EQUAL)]
    merged, residual = residual_lora(updates)
    assert merged.a.dtype == merged.b.dtype == torch.bfloat16
    assert residual.dtype == torch.float32
    assert distance(merged.change() + residual, reference(updates)) < 1e-5


def test_factors_keep_their_dtype() -> None:
    updates = make(MIXED)
    for dtype in (torch.bfloat16, torch.float64):
        cast = [replace(update, factors=update.factors.to(dtype)) for update in updates]
        for merged in (stacked_lora(cast, 1.0), truncated_lora(cast, 3, 1.0), padded_lora(cast, 8, 1.0)):
            assert merged.a.dtype == merged.b.dtype == dtype
        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-12
        assert distance(stacked_lora(cast, 1.0).change(), reference(cast)) < tolerance


@given(clients(), st.integers(1, 12), st.floats(0.1, 8))
@settings(max_examples=30, deadline=None)
def test_truncation_is_the_best_of_its_rank(updates: list[LoraUpdate], rank: int, scale: float) -> None:
    wanted = reference(updates)
    u, values, v = np.linalg.svd(wanted, full_matrices=False)
    merged = truncated_lora(updates, rank, scale)
    assert merged.a.shape == (rank, wanted.shape[1])
    assert merged.b.shape == (wanted.shape[0], rank)
    assert merged.scale == scale
    found = merged.change().double().numpy()
    kept = np.append(values, [0.0] * rank)
    if kept[rank - 1] - kept[rank] > 1e-3 * values[0]:  # else the best approximation is not unique
        best = (u[:, :rank] * values[:rank]) @ v[:rank]
        assert distance(found, best) < 1e-4
    # Eckart and Young: the error is the tail of the singular values.
    tail = math.sqrt((values[rank:] ** 2).sum())
    assert np.linalg.norm(found - wanted) == pytest.approx(tail, rel=1e-4, abs=1e-5 * values[0])
    # The singular values are split evenly, and the sign is the one agreed.
    a, b = merged.a.double(), merged.b.double()
    even = np.diag(kept[:rank] / scale)
    np.testing.assert_allclose(b.T @ b, even, atol=1e-5 * values[0] / scale)
    np.testing.assert_allclose(a @ a.T, even, atol=1e-5 * values[0] / scale)
    assert all(column[column.abs().argmax()] >= 0 for column in merged.b.T)


def test_truncation_does_not_depend_on_the_order_of_clients() -> None:
    updates = make(MIXED)
    one, other = truncated_lora(updates, 5, 2.0), truncated_lora(updates[::-1], 5, 2.0)
    torch.testing.assert_close(one.a, other.a, rtol=0, atol=1e-5)
    torch.testing.assert_close(one.b, other.b, rtol=0, atol=1e-5)


def test_truncated_rows_are_the_best_of_a_smaller_rank() -> None:
    updates = make(MIXED)
    small = truncate_rank(truncated_lora(updates, 6, 2.0), 3)
    u, values, v = np.linalg.svd(reference(updates))
    assert distance(small.change(), (u[:, :3] * values[:3]) @ v[:3]) < 1e-4


def test_compression_keeps_scale_and_pads_with_zeros() -> None:
    factors = make([3])[0].factors
    same = compress_lora(factors, 7)
    assert (same.rank, same.scale) == (7, factors.scale)
    assert distance(same.change(), factors.change().double().numpy()) < 1e-6
    assert not same.a[3:].any()
    assert not same.b[:, 3:].any()
    u, values, v = np.linalg.svd(factors.change().double().numpy())
    assert distance(compress_lora(factors, 1).change(), values[0] * np.outer(u[:, 0], v[0])) < 1e-5


@st.composite
def deficient_factors(draw: Any) -> LoraFactors:
    """Factors of which B has any rank from 0 on, ranks above the size of the matrix among them."""
    out, in_, rank = (draw(st.integers(1, 8)) for _ in range(3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    inner = draw(st.integers(0, rank))
    b = torch.randn(out, inner, generator=generator) @ torch.randn(inner, rank, generator=generator)
    a = torch.randn(rank, in_, generator=generator)
    return LoraFactors(orthonormal_rows(a) if draw(st.booleans()) else a, b, 2.0)


def check_orthonormal(a: Tensor) -> None:
    """The first rows are, and those beyond the width are zero."""
    rank, in_ = a.shape
    wanted = np.diag([1.0] * min(rank, in_) + [0.0] * max(0, rank - in_))
    np.testing.assert_allclose(a.double() @ a.double().T, wanted, atol=1e-6)


@given(deficient_factors())
@settings(max_examples=50, deadline=None)
def test_refactored_is_the_singular_value_decomposition(factors: LoraFactors) -> None:
    found = refactored(factors)
    assert (found.a.shape, found.b.shape) == (factors.a.shape, factors.b.shape)
    assert (found.scale, found.a.dtype) == (factors.scale, torch.float32)
    dense = factors.b.double().numpy() @ factors.a.double().numpy()
    size = np.linalg.norm(dense)
    assert np.linalg.norm(found.b.double().numpy() @ found.a.double().numpy() - dense) <= 1e-6 * size
    check_orthonormal(found.a)
    values = np.linalg.svd(dense, compute_uv=False)[: factors.rank]
    squares = np.zeros(factors.rank)
    squares[: len(values)] = values**2
    gram = found.b.double().T @ found.b.double()
    np.testing.assert_allclose(gram, np.diag(squares), atol=2e-6 * size**2)
    assert all(column[column.abs().argmax()] >= 0 for column in found.b.T)
    # The rows span what they spanned, so that a change of B' is one of B, and as long as it where that is.
    rows = orthonormal_rows(factors.a)
    change = torch.randn(factors.b.shape, generator=torch.Generator().manual_seed(1))
    turned = in_rows_of(change, found.a, rows)
    np.testing.assert_allclose(turned @ rows, change @ found.a, atol=1e-5)
    assert turned.norm() <= change.norm() * (1 + 1e-6)
    if factors.rank <= factors.a.shape[1]:
        assert float(turned.norm()) == pytest.approx(float(change.norm()), rel=1e-5)


def test_refactored_keeps_the_rows_of_a_that_a_change_does_not_use() -> None:
    a = orthonormal_rows(torch.randn(3, 6, generator=torch.Generator().manual_seed(0)))
    nothing = refactored(LoraFactors(a, torch.zeros(5, 3)))
    torch.testing.assert_close(nothing.a, a, rtol=0, atol=1e-6)
    assert not nothing.b.any()
    b = torch.zeros(5, 3)
    b[:, 1] = torch.arange(1.0, 6.0)
    one = refactored(LoraFactors(a, b))
    torch.testing.assert_close(one.a, a[[1, 0, 2]], rtol=0, atol=1e-6)
    torch.testing.assert_close(one.b, b[:, [1, 0, 2]])


@pytest.mark.parametrize("shape", [(4, 9), (4, 4), (6, 3)])
def test_orthonormal_rows_are_those_of_gram_and_schmidt(shape: tuple[int, int]) -> None:
    a = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    found, rows = orthonormal_rows(a), list[np.ndarray]()
    for row in a.double().numpy()[: shape[1]]:
        rest = row - sum((one @ row) * one for one in rows)
        rows.append(rest / np.linalg.norm(rest))
    np.testing.assert_allclose(found[: shape[1]], np.stack(rows), atol=1e-5)
    assert not found[shape[1] :].any()
    torch.testing.assert_close(orthonormal_rows(found), found, rtol=0, atol=1e-6)
    check_orthonormal(orthonormal_rows(torch.zeros(shape)))


@given(clients(), st.floats(0.1, 8))
@settings(max_examples=30, deadline=None)
def test_padded_lora_follows_a_plain_loop(updates: list[LoraUpdate], scale: float) -> None:
    rank = max(update.factors.rank for update in updates) + 1
    out, in_ = dense(updates[0]).shape
    a, b, total = np.zeros((rank, in_)), np.zeros((out, rank)), 0.0
    for update in updates:
        p = update.weight * np.linalg.norm(dense(update))
        r = update.factors.rank
        a[:r] += p * update.factors.a.double().numpy()
        b[:, :r] += p * update.factors.scale / scale * update.factors.b.double().numpy()
        total += p
    merged = padded_lora(updates, rank, scale)
    assert merged.scale == scale
    assert distance(merged.a, a / total) < 1e-5
    assert distance(merged.b, b / total) < 1e-5


def test_padded_lora_of_no_change_is_the_plain_mean() -> None:
    updates = [
        replace(update, factors=replace(update.factors, b=torch.zeros(OUT, 4))) for update in make(EQUAL)
    ]
    merged = padded_lora(updates, 6, 2.0)
    wanted = np.average([update.factors.a.numpy() for update in updates], axis=0, weights=shares(updates))
    np.testing.assert_allclose(merged.a[:4], wanted, atol=1e-6)
    assert not merged.a[4:].any()
    assert not merged.b.any()


def test_a_client_without_change_has_no_say_in_padded_lora() -> None:
    one, other = make([4, 2])
    other = replace(other, factors=replace(other.factors, b=torch.zeros(OUT, 2)))
    merged = padded_lora([one, other], 4, one.factors.scale)
    assert distance(merged.change(), dense(one)) < 1e-6


def test_scale_and_rank_of_factors() -> None:
    factors = make([4])[0].factors
    wanted = factors.change().double().numpy()
    other = with_scale(factors, 0.3)
    assert other.scale == 0.3
    assert torch.equal(other.a, factors.a)
    assert distance(other.change(), wanted) < 1e-6
    assert distance(pad_rank(factors, 9).change(), wanted) < 1e-6
    first = truncate_rank(factors, 2)
    assert torch.equal(first.a, factors.a[:2])
    assert torch.equal(first.b, factors.b[:, :2])
    assert first.scale == factors.scale
    assert change_norm(factors) == pytest.approx(np.linalg.norm(wanted), rel=1e-6)
    for wrong in (
        lambda: pad_rank(factors, 3),
        lambda: truncate_rank(factors, 5),
        lambda: truncate_rank(factors, 0),
    ):
        with pytest.raises(ValueError, match="rank 4 cannot"):
            wrong()
    with pytest.raises(ValueError, match="1 or more"):
        compress_lora(factors, 0)


@pytest.mark.parametrize("shape", [(7, 11), (11, 7), (6, 6)])
@pytest.mark.parametrize("rank", [1, 4, 6])
def test_frozen_bases_are_singular_vectors(shape: tuple[int, int], rank: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    b, a = frozen_bases(weight, rank)
    assert (b.shape, a.shape) == ((shape[0], rank), (rank, shape[1]))
    u, values, v = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    signs = np.sign(u[np.abs(u).argmax(0), np.arange(u.shape[1])])
    np.testing.assert_allclose(b, (u * signs)[:, :rank], atol=1e-5)
    np.testing.assert_allclose(a, (signs[:, None] * v)[:rank], atol=1e-5)
    np.testing.assert_allclose(b.T @ weight @ a.T, np.diag(values[:rank]), atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 5), (5, 8)])
def test_frozen_bases_of_a_deficient_weight_are_orthonormal(shape: tuple[int, int]) -> None:
    weight = torch.outer(torch.arange(1.0, shape[0] + 1), torch.ones(shape[1])).to(torch.bfloat16)
    for matrix in (weight, torch.zeros(shape)):
        b, a = frozen_bases(matrix, 4)
        torch.testing.assert_close(b.T @ b, torch.eye(4), rtol=0, atol=1e-6)
        torch.testing.assert_close(a @ a.T, torch.eye(4), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="rank 6"):
        frozen_bases(weight, 6)


@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv1d"])
def test_mean_of_r_is_exact_on_layers(conv: bool) -> None:
    torch.manual_seed(4)
    layer = Conv1D(OUT, IN) if conv else nn.Linear(IN, OUT)
    b, a = frozen_bases(layout := layer_layout(layer.weight.detach(), conv), 3)
    weights = [1.0, 5.0, 0.5]
    cores = [torch.randn(3, 3) for _ in weights]
    changes = [b.double().numpy() @ core.double().numpy() @ a.double().numpy() for core in cores]
    wanted = layout.double().numpy() + np.average(changes, axis=0, weights=weights)
    x = torch.randn(5, IN)
    outputs = x.double().numpy() @ wanted.T + layer.bias.detach().double().numpy()
    core = weighted_mean(({"r": r}, w) for r, w in zip(cores, weights, strict=True))["r"]
    with torch.no_grad():
        layer.weight += layer_layout(b @ core @ a, conv)
        assert distance(layer(x), outputs) < 1e-5
    assert float((b @ core @ a).norm()) == pytest.approx(float(core.norm()), rel=1e-5)


def test_aggregation_error_over_several_matrices() -> None:
    one, two = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0], [4.0]])
    pairs = [(one + torch.tensor([[0.0, 0.3]]), one), (two - torch.tensor([[0.4], [0.0]]), two)]
    assert aggregation_error(iter(pairs)) == pytest.approx(0.1, rel=1e-6)
    assert aggregation_error([]) == 0.0
    assert aggregation_error([(one * 0, one * 0)]) == 0.0
    assert aggregation_error([(one, one * 0)]) == math.inf
    with pytest.raises(ValueError, match=r"\(1, 2\).*\(2, 1\)"):
        aggregation_error([(one, two)])


@given(clients(), st.booleans())
@settings(max_examples=30, deadline=None)
def test_inner_products_are_those_of_dense_changes(updates: list[LoraUpdate], started: bool) -> None:
    out, in_ = dense(updates[0]).shape
    start = make([3], shape=(out, in_), seed=7)[0].factors if started else None
    zero = dense(LoraUpdate("start", start)) if start else np.zeros((out, in_))
    flat = np.stack([(dense(update) - zero).ravel() for update in updates])
    gram = lora_inner_products(iter(updates), start)
    assert gram.dtype == torch.float64
    assert gram.shape == (len(updates), len(updates))
    scale = max(np.linalg.norm(flat), np.linalg.norm(zero)) ** 2
    np.testing.assert_allclose(gram, flat @ flat.T, rtol=0, atol=1e-12 * scale)


def test_inner_products_see_changes_not_factors() -> None:
    """Two clients with the same change in different factors are at distance zero; matrices add."""
    one, other = make([4, 2])
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(5))).Q
    turned = LoraFactors(turn.T @ one.factors.a, one.factors.b @ turn, one.factors.scale)
    updates = [one, LoraUpdate("turned", turned), other]
    gram = lora_inner_products(updates)
    squared = gram.diagonal()[:, None] + gram.diagonal()[None] - 2 * gram
    assert float(squared[0, 1]) < 1e-10 * float(gram[0, 0])
    assert float(squared[0, 2]) == pytest.approx(np.linalg.norm(dense(one) - dense(other)) ** 2, rel=1e-6)
    second = make([1, 3, 5], shape=(4, 6), seed=6)
    both = np.stack(
        [np.concatenate([dense(x).ravel(), dense(y).ravel()]) for x, y in zip(updates, second, strict=True)]
    )
    np.testing.assert_allclose(gram + lora_inner_products(second), both @ both.T, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize(
    "rule",
    [residual_lora, lambda updates: padded_lora(updates, 4, 1.0)],
    ids=["residual", "padded"],
)
def test_rules_hold_no_more_than_a_few_clients_at_once(rule: Callable[[Iterator[LoraUpdate]], Any]) -> None:
    seen: list[weakref.ref[Tensor]] = []
    most = 0

    def stream() -> Iterator[LoraUpdate]:
        nonlocal most
        for k in range(12):
            update = make([4], seed=k)[0]
            seen.append(weakref.ref(update.factors.b))
            yield update
            most = max(most, sum(ref() is not None for ref in seen))
            del update

    rule(stream())
    assert len(seen) == 12
    assert most <= 3  # the first, to which all are compared, and those passing through


RULES: dict[str, Callable[[list[LoraUpdate]], Any]] = {
    "residual": residual_lora,
    "stacked": lambda updates: stacked_lora(updates, 1.0),
    "truncated": lambda updates: truncated_lora(updates, 2, 1.0),
    "padded": lambda updates: padded_lora(updates, 8, 1.0),
    "inner products": lora_inner_products,
}


@pytest.mark.parametrize("rule", RULES)
def test_unsound_updates_are_refused_by_name(rule: str) -> None:
    one, two = make([4, 4])
    a, b = two.factors.a, two.factors.b
    unsound = {
        r"out 12 and in 8, where client 'c0' has 12 and 9": LoraFactors(a[:, :8], b, 4.0),
        r"out 11 and in 9, where client 'c0' has 12 and 9": LoraFactors(a, b[:11], 4.0),
        r"A must be \(rank, in\)": LoraFactors(a[:3], b, 4.0),
        r"not \(9, 4\) and \(12, 4\)": LoraFactors(a.T, b, 4.0),
        r"not \(9,\) and \(12, 4\)": LoraFactors(a[0], b, 4.0),
        r"its scale must be positive, not 0.0": LoraFactors(a, b, 0.0),
    }
    for message, factors in unsound.items():
        with pytest.raises(ValueError, match=rf"client 'c1': .*{message}"):
            RULES[rule]([one, replace(two, factors=factors)])
    for weight in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"client 'c1': its weight must be positive, not {weight}"):
            RULES[rule]([one, replace(two, weight=weight)])
    with pytest.raises(ValueError, match="no update"):
        RULES[rule]([])


def test_means_of_factors_refuse_mixed_ranks() -> None:
    with pytest.raises(ValueError, match=r"client 'c2': rank 2, where client 'c0' has 4; .*equal ranks"):
        residual_lora(make([4, 4, 2]))
    with pytest.raises(ValueError, match=r"client 'c1': scale 2\.0, where client 'c0' has 1\.0"):
        residual_lora(make([4, 4], scales=[1.0, 2.0]))


def test_other_bad_arguments() -> None:
    updates = make([4, 8])
    with pytest.raises(ValueError, match="client 'c1': rank 8; at most 4"):
        padded_lora(updates, 4, 1.0)
    for rule in (stacked_lora, lambda one, scale: padded_lora(one, 8, scale)):
        with pytest.raises(ValueError, match="merged scale must be positive"):
            rule(updates, 0.0)
    with pytest.raises(ValueError, match=r"'start'.* in 3"):
        lora_inner_products(updates, LoraFactors(torch.zeros(1, 3), torch.zeros(OUT, 1)))
