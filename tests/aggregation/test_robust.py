"""Rules against hostile clients, and the mean of unequal work, against plain loops over dense vectors."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcustom.aggregation import robust
from fedcustom.aggregation.combine import Change, combine, normalised_mean
from fedcustom.aggregation.settings import AggregationSettings
from fedcustom.core.tensors import Tensors


def cohort(count: int, seed: int = 0, hostile: int = 0) -> tuple[list[Tensors], np.ndarray]:
    """Changes of two tensors around a common direction, and the same as rows; the last ones are flipped."""
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=11) + 0.3 * generator.normal(size=(count, 11))
    rows[count - hostile :] *= -10
    states = [
        {
            "a": torch.from_numpy(row[:6].reshape(2, 3).astype(np.float32)),
            "b": torch.from_numpy(row[6:].astype(np.float32)),
        }
        for row in rows
    ]
    return states, rows.astype(np.float32).astype(np.float64)


def flat(tensors: Tensors) -> np.ndarray:
    return np.concatenate([tensors["a"].numpy().ravel(), tensors["b"].numpy()])


def combined(states: list[Tensors], **more: Any) -> np.ndarray:
    changes = [Change(str(i), state, weight=1.0 + 5 * i) for i, state in enumerate(states)]
    root = more.pop("root", None)
    return flat(combine(changes, AggregationSettings(**more), root=root))


def test_median_and_trimmed_mean() -> None:
    for count in (1, 2, 5, 6):
        states, rows = cohort(count, count)
        np.testing.assert_allclose(combined(states, rule="median"), np.median(rows, axis=0), rtol=1e-5)
    states, rows = cohort(7, 3)
    expected = np.sort(rows, axis=0)[2:5].mean(axis=0)
    np.testing.assert_allclose(
        combined(states, rule="trimmed_mean", byzantine_fraction=0.2), expected, rtol=1e-5, atol=1e-7
    )
    with pytest.raises(ValueError, match="leaves nothing of 4"):
        robust.trimmed_mean(cohort(4)[0], 2)


@pytest.mark.parametrize(("count", "byzantine"), [(7, 1), (9, 2), (4, 1), (3, 0), (1, 0)])
def test_krum_by_brute_force(count: int, byzantine: int) -> None:
    states, rows = cohort(count, count, hostile=byzantine)
    nearest = max(1, min(count - byzantine - 2, count - 1))
    scores = []
    for i in range(count):
        away = sorted(float(((rows[i] - rows[j]) ** 2).sum()) for j in range(count) if j != i)
        scores.append(sum(away[:nearest]))
    order = np.argsort(scores, kind="stable")
    gram = robust.inner_products(states)
    assert int(robust.krum(gram, byzantine).argmax()) == order[0]
    chosen = max(1, count - byzantine)
    expected = rows[order[:chosen]].mean(axis=0)
    fraction = byzantine / count
    np.testing.assert_allclose(
        combined(states, rule="multi_krum", byzantine_fraction=fraction), expected, rtol=1e-4, atol=1e-6
    )


def test_the_geometric_median_is_the_minimum() -> None:
    states, rows = cohort(7, 1, hostile=2)
    found = combined(states, rule="geometric_median")

    def total(point: np.ndarray) -> float:
        return float(np.linalg.norm(rows - point, axis=1).sum())

    best = total(found)
    generator = np.random.default_rng(0)
    for scale in (1e-1, 1e-2, 1e-3):
        for _ in range(50):
            assert total(found + scale * generator.normal(size=11)) >= best - 1e-5
    # Three points on a line: the middle one.
    line = [{"w": torch.tensor([x])} for x in (0.0, 1.0, 50.0)]
    result = combine([Change("", x) for x in line], AggregationSettings(rule="geometric_median"))
    assert float(result["w"]) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("bound", [None, 0.7])
def test_norm_bounding_and_centred_clipping(bound: float | None) -> None:
    states, rows = cohort(6, 2, hostile=1)
    norms = np.linalg.norm(rows, axis=1)
    limit = bound or np.sort(norms)[(6 - 1) // 2]  # torch's median is the lower middle
    clipped = rows * np.minimum(1, limit / norms)[:, None]
    np.testing.assert_allclose(
        combined(states, rule="norm_bounding", bound=bound), clipped.mean(axis=0), rtol=1e-4, atol=1e-6
    )
    centre = np.zeros(11)
    for _ in range(5):
        away = rows - centre
        distance = np.linalg.norm(away, axis=1, keepdims=True)
        centre = centre + (away * np.minimum(1, limit / np.maximum(distance, 1e-30))).mean(axis=0)
    np.testing.assert_allclose(
        combined(states, rule="centred_clipping", bound=bound), centre, rtol=1e-4, atol=1e-6
    )


def test_fltrust() -> None:
    states, rows = cohort(6, 4, hostile=2)
    root_state, root_row = cohort(1, 4)
    reference = root_row[0]
    trust = [
        max(0.0, float(row @ reference) / np.linalg.norm(row) / np.linalg.norm(reference)) for row in rows
    ]
    assert trust[-1] == trust[-2] == 0
    expected = sum(
        t * row * np.linalg.norm(reference) / np.linalg.norm(row) for t, row in zip(trust, rows, strict=True)
    ) / sum(trust)
    np.testing.assert_allclose(
        combined(states, rule="fltrust", root=root_state[0]), expected, rtol=1e-4, atol=1e-6
    )
    against = {name: -tensor for name, tensor in states[0].items()}
    nobody = combine([Change("", states[0])], AggregationSettings(rule="fltrust"), root=against)
    assert not flat(nobody).any()


ROBUST = [
    "median",
    "trimmed_mean",
    "krum",
    "multi_krum",
    "geometric_median",
    "norm_bounding",
    "centred_clipping",
]


@pytest.mark.parametrize("rule", ROBUST)
def test_robust_rules_stay_with_the_honest(rule: str) -> None:
    states, rows = cohort(10, 7, hostile=2)
    honest = rows[:8].mean(axis=0)
    plain = rows.mean(axis=0)
    found = combined(states, rule=rule)
    cosine = found @ honest / np.linalg.norm(found) / np.linalg.norm(honest)
    assert cosine > 0.85
    assert plain @ honest < 0  # where the mean turns round
    assert np.linalg.norm(found - honest) < np.linalg.norm(plain - honest) / 2


@given(st.lists(st.tuples(st.floats(-10, 10), st.floats(0.1, 9), st.integers(1, 20)), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_fednova(clients: list[tuple[float, float, int]]) -> None:
    total = sum(weight for _, weight, _ in clients)
    effective = sum(weight / total * steps for _, weight, steps in clients)
    expected = effective * sum(weight / total * value / steps for value, weight, steps in clients)
    found = normalised_mean(
        ({"w": torch.tensor([value], dtype=torch.float64)}, weight, steps) for value, weight, steps in clients
    )
    assert float(found["w"]) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_equal_steps_make_fednova_the_mean() -> None:
    states, _ = cohort(4, 5)
    by_steps = [Change(str(i), state, 1.0 + i, steps=7) for i, state in enumerate(states)]
    nova = combine(by_steps, AggregationSettings(rule="fednova"))
    mean = combine(by_steps, AggregationSettings())
    np.testing.assert_allclose(flat(nova), flat(mean), rtol=1e-5, atol=1e-7)


def test_late_changes_count_less() -> None:
    changes = [
        Change("a", {"w": torch.tensor([4.0])}, 1.0, discount=1.0),
        Change("b", {"w": torch.tensor([8.0])}, 3.0, discount=0.5),
    ]
    # FedBuff: the discount shrinks the change, not its share of the weights.
    assert float(combine(changes, AggregationSettings())["w"]) == pytest.approx((4 + 3 * 4) / 4)


def test_means_stream() -> None:
    """Ten thousand changes are combined while no more than one of them exists."""
    alive = 0
    most = 0

    class Counted(dict[str, Any]):
        def __init__(self) -> None:
            nonlocal alive, most
            super().__init__(w=torch.ones(3))
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    result = combine((Change("", Counted()) for _ in range(10_000)), AggregationSettings())
    assert torch.equal(result["w"], torch.ones(3))
    assert most <= 3


def test_gram_matrices_measure_distances() -> None:
    states, rows = cohort(5, 8)
    away = robust.distances(robust.inner_products(states)).numpy()
    for i, j in itertools.product(range(5), repeat=2):
        assert away[i, j] == pytest.approx(np.linalg.norm(rows[i] - rows[j]), abs=1e-5)
    assert robust.byzantine_count(10, 0.2) == 2
    assert robust.byzantine_count(10, 0.21) == 3
    assert math.isclose(robust.byzantine_count(7, 0.0), 0)


def test_nothing_to_combine() -> None:
    for rule in ("mean", "median", "krum"):
        with pytest.raises(ValueError, match="there is no"):
            combine([], AggregationSettings(rule=rule))  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", [*ROBUST, "fltrust"])
@pytest.mark.parametrize("value", [1e20, 3.4e38, -3.4e38])
def test_changes_of_any_finite_size_move_no_robust_rule_far(rule: str, value: float) -> None:
    states, rows = cohort(7, 5)
    honest = rows[:5]
    for state in states[5:]:
        for tensor in state.values():
            tensor.fill_(value)
    root = states[0] if rule == "fltrust" else None
    found = combined(states, rule=rule, byzantine_fraction=2 / 7, root=root)
    assert np.isfinite(found).all()
    centre = honest.mean(axis=0)
    spread = np.linalg.norm(honest - centre, axis=1).max() + np.linalg.norm(honest, axis=1).max()
    assert np.linalg.norm(found - centre) < 2 * spread


def test_the_geometric_median_of_a_majority_that_agrees_is_what_it_agrees_on() -> None:
    states, _ = cohort(5, 2)
    for state in states[1:3]:
        for name, tensor in state.items():
            tensor.copy_(states[0][name])
    for value in (1e3, 1e30, 3.4e38):
        for state in states[3:]:
            for tensor in state.values():
                tensor.fill_(value)
        np.testing.assert_allclose(combined(states, rule="geometric_median"), flat(states[0]), rtol=1e-4)
