"""Correlated noise: solved exactly, of the covariance that is accounted for, and with the sensitivity."""

from __future__ import annotations

from itertools import combinations, pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import toeplitz

from fedcustom.core.tensors import Tensors
from fedcustom.privacy.noise import NoiseKey
from fedcustom.privacy.strategy import (
    MOST_OPTIMISED,
    CorrelatedNoise,
    banded_toeplitz,
    remaining_noise,
    square_root,
    weights_in_last_state,
)


def dense(coefficients: tuple[float, ...], rounds: int) -> np.ndarray:
    """C, (rounds, rounds)."""
    column = np.zeros(rounds)
    column[: len(coefficients)] = coefficients[:rounds]
    return np.asarray(np.tril(toeplitz(column)))


def largest_sensitivity(coefficients: tuple[float, ...], rounds: tuple[int, ...]) -> float:
    """The sensitivity of C X to a client with vectors of norm 1 in these rounds, ``sqrt(sum_ij |g_ij|)`` with
    the columns' inner products g: exact where none is negative, and an upper bound else.
    """
    columns = dense(coefficients, max(rounds) + len(coefficients))[:, list(rounds)]
    return float(np.sqrt(np.abs(columns.T @ columns).sum()))


def falling(rounds: int) -> list[float]:
    return [1 - t / rounds for t in range(rounds)]


def test_weights_in_the_last_state_are_those_of_a_server_with_momentum() -> None:
    factors, weights = falling(7), weights_in_last_state(falling(7), 0.9)
    for number in range(7):
        state = moment = 0.0
        for t, factor in enumerate(factors):
            moment = 0.9 * moment + factor * (t == number)
            state += moment
        assert weights[number] == pytest.approx(state)


@pytest.mark.parametrize(("rounds", "bands"), [(80, 10), (20, 20), (7, 3), (150, 4)])
def test_the_optimum_is_better_than_the_square_root_and_of_norm_1(rounds: int, bands: int) -> None:
    weights = weights_in_last_state(falling(rounds), 0.9)
    found = banded_toeplitz(weights, bands)
    root = square_root(bands)
    assert np.linalg.norm(found) == pytest.approx(1)
    assert remaining_noise(weights, found) < remaining_noise(weights, root / np.linalg.norm(root))
    inverse = np.linalg.inv(dense(found, rounds))
    expected = np.linalg.norm(weights @ inverse) / np.linalg.norm(weights)
    assert remaining_noise(weights, found) == pytest.approx(expected)
    for _ in range(200):  # no better strategy nearby
        other = np.array(found) + np.random.default_rng(_).normal(size=bands) * 1e-3
        assert remaining_noise(weights, other / np.linalg.norm(other)) > expected * (1 - 1e-5)


def test_the_specifications_figures() -> None:
    """T = 80, groups of 100 of 1,000 clients, momentum 0.9, a schedule that falls linearly."""
    weights = weights_in_last_state(falling(80), 0.9)
    left = remaining_noise(weights, banded_toeplitz(weights, 10))
    assert left * np.sqrt(8) / 1.66603 == pytest.approx(0.583, abs=1e-3)
    assert left * np.sqrt(8) / 0.501552 == pytest.approx(1.94, abs=5e-3)


def test_independent_noise_and_long_runs() -> None:
    assert banded_toeplitz([1.0] * 5, 1) == (1.0,)
    rounds = MOST_OPTIMISED + 1
    root = square_root(4)
    assert banded_toeplitz([1.0] * rounds, 4) == pytest.approx(tuple(root / np.linalg.norm(root)))
    assert root == pytest.approx([1, 1 / 2, 3 / 8, 5 / 16])
    with pytest.raises(ValueError, match="bands"):
        banded_toeplitz([1.0, 1.0], 3)


@pytest.mark.parametrize("bands", [1, 2, 3, 4])
def test_sensitivity_by_brute_force(bands: int) -> None:
    """Of every pattern whose turns are ``bands`` apart or more, with vectors of norm 1 in the worst
    directions: at most sqrt(k), with k the largest number of turns.
    """
    rounds = 9
    matrix = dense(banded_toeplitz(weights_in_last_state(falling(rounds), 0.9), bands), rounds)
    worst = 0.0
    for number in range(1, rounds + 1):
        for turns in combinations(range(rounds), number):
            if any(b - a < bands for a, b in pairwise(turns)):
                continue
            for signs in product((1.0, -1.0), repeat=number):
                x = np.zeros(rounds)
                x[list(turns)] = signs
                worst = max(worst, float(np.linalg.norm(matrix @ x)))
    most = -(-rounds // bands)
    assert worst <= np.sqrt(most) * (1 + 1e-12)
    if rounds % bands == 0 or bands == 1:
        assert worst > np.sqrt(most) * 0.5


def test_turns_closer_than_the_bands_would_reveal_more() -> None:
    column = banded_toeplitz(weights_in_last_state(falling(9), 0.0), 3)
    assert largest_sensitivity(column, (0, 3, 6)) == pytest.approx(np.sqrt(3))
    assert largest_sensitivity(column, (0, 1, 2)) > np.sqrt(3) * 1.1


def shapes(number: int) -> Tensors:
    return {"a": torch.zeros(3, 2), "b": torch.zeros(5)}


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 5))
def test_rows_are_those_of_a_dense_solve(rounds: int, bands: int, seed: int) -> None:
    bands = min(bands, rounds)
    coefficients = banded_toeplitz(weights_in_last_state(falling(rounds), 0.9), bands)
    key = NoiseKey.seeded(seed)
    noise = CorrelatedNoise(coefficients, lambda t: key.normal_like(t, "noise", shapes(t)))
    drawn = [key.normal_like(t, "noise", shapes(t)) for t in range(rounds)]
    for name in ("a", "b"):
        z = np.stack([row[name].numpy().ravel() for row in drawn])
        expected = np.linalg.solve(dense(coefficients, rounds), z)
        found = np.stack([noise.row(t)[name].numpy().ravel() for t in range(rounds)])
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_rows_are_the_same_in_any_order_and_few_are_held() -> None:
    coefficients = banded_toeplitz(falling(12), 4)
    key = NoiseKey.seeded(0)

    def draw(number: int) -> Tensors:
        return key.normal_like(number, "noise", shapes(number))

    whole = CorrelatedNoise(coefficients, draw)
    rows = [whole.row(t) for t in range(12)]
    assert len(whole._rows) <= 4
    for number in (11, 3, 4, 0, 7):
        fresh = CorrelatedNoise(coefficients, draw)
        assert torch.equal(fresh.row(number)["a"], rows[number]["a"])
        assert torch.equal(whole.row(number)["b"], rows[number]["b"])


def test_the_covariance_of_what_is_released_is_that_of_the_strategy() -> None:
    rounds, count = 6, 200_000
    coefficients = banded_toeplitz(weights_in_last_state(falling(rounds), 0.9), 3)
    key = NoiseKey.seeded(1)
    noise = CorrelatedNoise(coefficients, lambda t: {"x": torch.from_numpy(key.normal(t, "x", count).copy())})
    found = np.stack([noise.row(t)["x"].double().numpy() for t in range(rounds)])
    inverse = np.linalg.inv(dense(coefficients, rounds))
    np.testing.assert_allclose(found @ found.T / count, inverse @ inverse.T, atol=0.02)
