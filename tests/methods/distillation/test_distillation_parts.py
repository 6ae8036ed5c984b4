"""The parts of knowledge distillation: ensembles, packing and losses, against plain numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcustom.core.errors import UpdateError
from fedcustom.methods.distillation import ensemble, packing
from fedcustom.methods.distillation.losses import divergence, top_k_divergence
from fedcustom.methods.distillation.packing import Format, TopK
from fedcustom.transport import wire

# --- ensembles ---


def by_hand(said: np.ndarray, weights: np.ndarray, rule: str) -> np.ndarray:  # type: ignore[type-arg]
    """One text's ensemble, client by client and label by label."""
    clients, labels = said.shape
    if rule == "logits":
        logits = [sum(weights[k] * math.log(said[k, c]) for k in range(clients)) for c in range(labels)]
        odds = [math.exp(logit / sum(weights)) for logit in logits]
        return np.array(odds) / sum(odds)
    factors = list(weights)
    for k in range(clients):
        if rule == "confidence":
            factors[k] *= max(said[k])
        if rule == "entropy":
            factors[k] *= 1 + sum(p * math.log(p) for p in said[k]) / math.log(labels)
    mean = [sum(factors[k] * said[k, c] for k in range(clients)) / sum(factors) for c in range(labels)]
    if rule == "sharpened":
        mean = [math.exp(p / 0.1) for p in mean]
    if rule == "power":
        mean = [p**1.5 for p in mean]
    return np.array(mean) / sum(mean)


@pytest.mark.parametrize("rule", ["mean", "logits", "sharpened", "power", "confidence", "entropy"])
@given(st.integers(1, 4), st.integers(1, 3), st.integers(2, 5), st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_ensembles(rule: ensemble.Rule, clients: int, texts: int, labels: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    said = generator.dirichlet(np.ones(labels), (clients, texts)).clip(1e-9)
    said /= said.sum(2, keepdims=True)
    weights = generator.uniform(0.1, 5, (clients, texts))
    weights[1:, 0] = 0  # only the first client was asked about the first text
    found = ensemble.combine(torch.from_numpy(said), torch.from_numpy(weights), rule)
    expected = np.stack([by_hand(said[:, n], weights[:, n], rule) for n in range(texts)])
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-5, atol=1e-9)


def test_a_veto_ends_at_the_smallest_probability() -> None:
    said = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    found = ensemble.mean_of_logits(said, torch.tensor([[3.0], [1.0]]), smallest=0.01)
    odds = 0.01 ** (1 / 4) / 0.01 ** (3 / 4)  # 0.75 log 1 + 0.25 log 0.01 against 0.25 log 1 + 0.75 log 0.01
    torch.testing.assert_close(found, torch.tensor([[odds, 1.0]]) / (1 + odds))


def test_sharpening_sharpens() -> None:
    flat = torch.tensor([[0.4, 0.3, 0.3]])
    assert ensemble.sharpened(flat, 0.1)[0, 0] > 0.55
    assert ensemble.power(flat, 4.0)[0, 0] > 0.55
    torch.testing.assert_close(ensemble.power(flat, 1.0), flat)


# --- what travels ---


@given(
    st.integers(0, 6),
    st.integers(2, 300),
    st.none() | st.integers(1, 12),
    st.sampled_from([4, 8, 16]),
    st.integers(0, 2**31),
)
@settings(max_examples=30, deadline=None)
def test_packing_is_exact_to_a_quantum(
    rows: int, labels: int, top_k: int | None, bits: int, seed: int
) -> None:
    probabilities = np.random.default_rng(seed).dirichlet(np.full(labels, 0.3), rows)
    form, total = Format(labels, top_k, bits), 2**bits - 1
    packed = packing.pack(packing.largest(probabilities, form), form)
    back = packing.unpack(wire.decode(wire.encode(packed, {}))[0], rows, form)
    kept = min(top_k or labels, labels)
    sent = labels - 1 if kept == labels else kept
    size = math.ceil(rows * sent * bits / 8)
    if kept < labels:
        size += math.ceil(rows * sent * max(1, math.ceil(math.log2(labels))) / 8)
    assert sum(tensor.numel() for tensor in packed.values()) == size
    assert all(tensor.dtype == torch.uint8 for tensor in packed.values())
    np.testing.assert_allclose(back.probabilities.sum(1) + back.rest, 1)
    for row in range(rows):
        if kept < labels:
            assert probabilities[row][back.labels[row]].min() >= np.sort(probabilities[row])[-kept]
        exact = probabilities[row][back.labels[row]]
        assert np.abs(back.probabilities[row] - exact).max() < 1 / total + 1e-12
    dense = packing.dense(back, form).numpy()
    np.testing.assert_allclose(dense.sum(1), 1, rtol=1e-5)
    for row in range(rows):
        unsent = sorted(set(range(labels)) - set(back.labels[row].tolist()))
        np.testing.assert_allclose(dense[row, unsent], back.rest[row] / max(1, len(unsent)), atol=1e-7)


def test_malformed_rows_are_refused() -> None:
    form = Format(6, 2, 8)
    rows = TopK(np.array([[0, 3], [1, 2]]), np.array([[0.6, 0.3], [0.5, 0.5]]), np.array([0.1, 0.0]))
    good = packing.pack(rows, form)
    packing.unpack(good, 2, form)

    def refused(message: str, count: int = 2, **tensors: Any) -> None:
        with pytest.raises(UpdateError, match=message):
            packing.unpack({name: t for name, t in {**good, **tensors}.items() if t is not None}, count, form)

    refused("wrong tensor names", labels=None)
    refused("wrong tensor names", more=torch.zeros(1))
    refused(r"torch.uint8 of \(4,\), not torch.uint8 of \(6,\)", count=3)
    refused("torch.float32", probabilities=torch.zeros(4))
    refused("row 1 sum to 1.5", probabilities=torch.tensor([255, 0, 255, 128], dtype=torch.uint8))
    refused("label 7: there are 6", labels=packing.pack_integers(np.array([[0, 7], [1, 2]]), 3))
    refused("twice in a row", labels=packing.pack_integers(np.array([[0, 3], [2, 2]]), 3))


@given(st.integers(1, 6), st.integers(2, 8), st.sampled_from([1.0, 2.5]), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_divergences(rows: int, labels: int, temperature: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(rows, labels)) * 3
    teacher = generator.dirichlet(np.ones(labels), rows)

    def student(t: float) -> Any:
        odds = np.exp(logits / t)
        return odds / odds.sum(1, keepdims=True)

    expected = temperature**2 * (teacher * np.log(teacher / student(temperature))).sum(1).mean()
    found = divergence(torch.from_numpy(logits), torch.from_numpy(teacher), temperature)
    assert float(found) == pytest.approx(expected, rel=1e-6)

    kept = generator.integers(1, labels)
    chosen = np.argsort(-teacher, axis=1)[:, :kept]
    given_, own = (np.take_along_axis(p, chosen, 1) for p in (teacher, student(1.0)))
    # The student's mass of all other labels counts as one in a million at least.
    both = [np.column_stack([p, np.maximum(1 - p.sum(1), least)]) for p, least in ((given_, 0), (own, 1e-6))]
    found = top_k_divergence(torch.from_numpy(logits), torch.from_numpy(chosen), torch.from_numpy(given_))
    np.testing.assert_allclose(found, (both[0] * np.log(both[0] / both[1])).sum(1), rtol=1e-4, atol=1e-4)
    assert float(found.sum()) <= (teacher * np.log(teacher / student(1.0))).sum() + 1e-6
