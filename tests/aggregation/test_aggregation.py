"""Aggregation against independent computations in NumPy float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from fedcustom.aggregation.mean import weighted_mean
from fedcustom.aggregation.server_optimizers import server_step
from fedcustom.aggregation.settings import AggregationSettings

finite = st.floats(-100, 100, width=32)


@st.composite
def weighted_states(draw: Any) -> list[tuple[dict[str, np.ndarray], float]]:
    shapes = draw(st.lists(array_shapes(max_dims=3, max_side=4), min_size=1, max_size=3))
    count = draw(st.integers(1, 6))
    return [
        (
            {f"t{i}": draw(arrays(np.float32, shape, elements=finite)) for i, shape in enumerate(shapes)},
            draw(st.floats(0.01, 1000)),
        )
        for _ in range(count)
    ]


@given(weighted_states())
@settings(max_examples=60, deadline=None)
def test_mean_is_the_weighted_mean(states: list[tuple[dict[str, np.ndarray], float]]) -> None:
    mean = weighted_mean(
        ({k: torch.from_numpy(v) for k, v in state.items()}, weight) for state, weight in states
    )
    for name in states[0][0]:
        expected = np.average(
            np.stack([state[name].astype(np.float64) for state, _ in states]),
            axis=0,
            weights=[w for _, w in states],
        )
        np.testing.assert_allclose(mean[name].numpy(), expected, rtol=1e-5, atol=1e-4)
        assert mean[name].dtype == torch.float32


def test_mean_by_hand() -> None:
    states = [({"w": torch.tensor([1.0, 2.0])}, 1.0), ({"w": torch.tensor([5.0, -2.0])}, 3.0)]
    assert torch.equal(weighted_mean(states)["w"], torch.tensor([4.0, -1.0]))


def test_mean_consumes_states_one_by_one() -> None:
    alive = 0

    def stream() -> Any:
        nonlocal alive
        for _ in range(5):
            alive += 1
            yield {"w": torch.ones(2)}, 1.0

    iterator = stream()
    assert alive == 0
    weighted_mean(iterator)
    assert alive == 5


def test_mean_of_half_precision_is_summed_in_single() -> None:
    states = [({"w": torch.tensor([1.0], dtype=torch.bfloat16)}, 1.0)] * 1000
    mean = weighted_mean(states)["w"]
    assert mean.dtype == torch.bfloat16
    assert mean.item() == 1.0  # a bfloat16 sum would stop at 256


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_mean_refuses_weights_that_are_not_positive(weight: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        weighted_mean([({"w": torch.ones(1)}, weight)])


def test_mean_refuses_other_names_and_no_states() -> None:
    with pytest.raises(KeyError, match="v"):
        weighted_mean([({"w": torch.ones(1)}, 1.0), ({"v": torch.ones(1)}, 1.0)])
    with pytest.raises(ValueError, match="no state"):
        weighted_mean([])


def reference_steps(rule: str, start: np.ndarray, means: list[np.ndarray], rate: float) -> np.ndarray:
    """Reddi et al. 2021, algorithm 2, and Hsu et al. 2019, written out for one array."""
    b1, b2, tau = 0.8, 0.95, 0.02
    x, m, v = start.copy(), np.zeros_like(start), np.full_like(start, tau**2)
    for mean in means:
        d = mean - x
        if rule == "fedavg":
            x = x + rate * d
            continue
        if rule == "nesterov":
            m = b1 * m + d
            x = x + rate * (d + b1 * m)
            continue
        if rule == "fedavgm":
            m = b1 * m + d
            x = x + rate * m
            continue
        m = b1 * m + (1 - b1) * d
        if rule == "fedadagrad":
            v = v + d * d
        if rule == "fedadam":
            v = b2 * v + (1 - b2) * d * d
        if rule == "fedyogi":
            v = v - (1 - b2) * d * d * np.sign(v - d * d)
        x = x + rate * m / (np.sqrt(v) + tau)
    return x


@pytest.mark.parametrize("rule", ["fedavg", "fedavgm", "nesterov", "fedadagrad", "fedadam", "fedyogi"])
@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_server_optimizers_follow_the_paper(rule: Any, rate: float) -> None:
    generator = np.random.default_rng(3)
    start = generator.normal(size=(3, 2))
    means = [generator.normal(size=(3, 2)) for _ in range(4)]
    settings_ = AggregationSettings(
        server_optimizer=rule,
        server_learning_rate=rate,
        momentum=0.8,
        second_momentum=0.95,
        adaptivity=0.02,
    )
    state, moments = {"w": torch.from_numpy(start)}, {}
    for mean in means:
        change = {"w": torch.from_numpy(mean) - state["w"]}
        state, moments = server_step(state, change, moments, settings_)
    np.testing.assert_allclose(state["w"].numpy(), reference_steps(rule, start, means, rate), rtol=1e-10)


def test_fedavg_takes_the_change_as_it_is() -> None:
    change = {"w": torch.tensor([0.5, -0.25])}
    state, moments = server_step({"w": torch.tensor([3.0, 4.0])}, change, {}, AggregationSettings())
    assert torch.equal(state["w"], torch.tensor([3.5, 3.75]))
    assert moments == {}


@pytest.mark.parametrize("optimizer", ["fedavgm", "nesterov", "fedadagrad", "fedadam", "fedyogi"])
def test_a_tensor_that_is_changed_later_starts_with_moments_of_its_own(optimizer: str) -> None:
    """A head that rested at first, or factors that are trained in turn."""
    settings = AggregationSettings(server_optimizer=optimizer)
    zero, one = {"a": torch.zeros(3)}, {"a": torch.ones(3)}
    _, moments = server_step(zero, dict(one), {}, settings)
    both, _ = server_step({**zero, "b": torch.zeros(2)}, {**one, "b": torch.ones(2)}, moments, settings)
    alone, _ = server_step({"b": torch.zeros(2)}, {"b": torch.ones(2)}, {}, settings)
    again, _ = server_step(zero, dict(one), moments, settings)
    assert torch.equal(both["b"], alone["b"])
    assert torch.equal(both["a"], again["a"])
