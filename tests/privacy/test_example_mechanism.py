"""Noise and batches of a client that hides its rows: statistics, calibration, and keys."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from fedcustom.core.errors import RecipeError
from fedcustom.privacy.accounting import gaussian_epsilon
from fedcustom.privacy.clipping import groups_of
from fedcustom.privacy.example_mechanism import (
    ExampleMechanism,
    ExamplePrivacy,
    RowPrivacy,
    example_mechanism,
)
from fedcustom.privacy.noise import NoiseKey
from fedcustom.privacy.settings import PrivacySettings


def section(**more: Any) -> PrivacySettings:
    if "noise_multiplier" not in more:
        more.setdefault("epsilon", 8.0)
    return PrivacySettings(**{"unit": "example", "delta": 1e-5, **more})


def rows_of(rows: int, batch_size: int, seed: int = 0, **more: Any) -> RowPrivacy:
    mechanism = ExampleMechanism(section(**more), rows, batch_size, 100, more.get("noise_multiplier", 1.0))
    return RowPrivacy(mechanism, NoiseKey.seeded(seed))


def test_each_row_is_drawn_by_itself_with_one_probability() -> None:
    """Binomial tests: of each row over all steps, of pairs of rows, and of each row in successive steps."""
    rows, batch, steps = 40, 7, 3000
    drawn = np.zeros((steps, rows), dtype=bool)
    privacy = rows_of(rows, batch)
    for step in range(steps):
        drawn[step, privacy.batch(step)] = True
    rate = batch / rows
    tests = [stats.binomtest(int(drawn[:, row].sum()), steps, rate).pvalue for row in range(rows)]
    tests += [
        stats.binomtest(int((drawn[:, 0] & drawn[:, other]).sum()), steps, rate**2).pvalue
        for other in range(1, rows)
    ]
    for row in range(rows):
        both = int((drawn[:-1:2, row] & drawn[1::2, row]).sum())
        tests.append(stats.binomtest(both, steps // 2, rate**2).pvalue)
    assert min(tests) > 0.01 / len(tests)
    sizes = drawn.sum(axis=1)
    assert stats.kstest(stats.binom.cdf(sizes, rows, rate), "uniform").statistic < 0.16  # steps of a CDF
    assert sizes.var() == pytest.approx(rows * rate * (1 - rate), rel=0.1)  # no fixed size


def test_batches_may_be_empty_and_whole() -> None:
    privacy = rows_of(200, 1)
    empty = sum(not privacy.batch(step) for step in range(2000))
    assert stats.binomtest(empty, 2000, (1 - 1 / 200) ** 200).pvalue > 1e-3
    whole = rows_of(5, 16)
    assert whole.mechanism.expected == 5
    assert whole.batch(3) == [0, 1, 2, 3, 4]


def test_noise_is_white_with_the_groups_bounds() -> None:
    """Standard deviations by group, and a covariance between tensors, steps and keys of nothing."""
    shapes = {"a": torch.zeros(40_000), "b": torch.zeros(100, 100), "h": torch.zeros(20_000)}
    groups = groups_of(list(shapes), {"h"})
    privacy = rows_of(10, 5, noise_multiplier=1.5, clip=0.25, clip_head=3.0)
    first = privacy.noise(0, shapes, groups)
    for name, bound in (("a", 0.25), ("b", 0.25), ("h", 3.0)):
        values = (first[name] / (1.5 * math.sqrt(2) * bound)).flatten().numpy()
        assert stats.kstest(values, "norm").pvalue > 1e-3
    later, other = privacy.noise(1, shapes, groups), rows_of(10, 5, 1, noise_multiplier=1.5, clip=0.25)
    pairs = [(first["a"][:10_000], first["b"].flatten()), (first["a"], later["a"])]
    pairs.append((first["a"], other.noise(0, shapes, groups)["a"]))
    for one, two in pairs:
        correlation = float(torch.corrcoef(torch.stack([one, two]))[0, 1])
        assert abs(correlation) < 4 / math.sqrt(len(one))
    alone = privacy.noise(0, {"h": shapes["h"]}, groups_of(["h"], {"h"}))["h"]
    assert torch.allclose(alone * math.sqrt(2), first["h"])  # one group: its bound alone


def test_each_client_calibrates_to_its_own_rows() -> None:
    """The figure of the specification, and a whole batch's noise by the exact Gaussian curve."""
    found = example_mechanism(section(), rows=545, batch_size=64, steps=200)
    assert found.noise_multiplier == pytest.approx(1.256, abs=1e-3)
    assert found.epsilon(200) == 8.0
    assert found.epsilon(0) == 0.0
    spent = [found.epsilon(steps) for steps in (1, 50, 100, 199)]
    assert spent == sorted(spent)
    assert spent[-1] < 8.0
    whole = example_mechanism(section(), rows=10, batch_size=64, steps=25)
    assert gaussian_epsilon(5 / whole.noise_multiplier, 1e-5) == pytest.approx(8.0, rel=1e-6)
    fixed = example_mechanism(section(noise_multiplier=1.256), rows=545, batch_size=64, steps=200)
    assert fixed.guarantee().epsilon == pytest.approx(8.0, rel=2e-3)


def test_a_second_accountant_agrees() -> None:
    from prv_accountant import PoissonSubsampledGaussianMechanism, PRVAccountant

    found = example_mechanism(section(noise_multiplier=1.1), rows=300, batch_size=30, steps=60)
    other = PRVAccountant(
        prvs=[PoissonSubsampledGaussianMechanism(sampling_probability=0.1, noise_multiplier=1.1)],
        max_self_compositions=[60],
        eps_error=0.01,
        delta_error=1e-10,
    )
    _, estimate, _ = other.compute_epsilon(delta=1e-5, num_self_compositions=[60])
    assert found.epsilon(60) == pytest.approx(estimate, rel=0.01)


def test_a_delta_that_would_publish_rows_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"privacy.delta = 0.001: at most 1 / \(10 rows\) = 0.0002"):
        example_mechanism(section(delta=1e-3), rows=500, batch_size=10, steps=5)


def test_a_task_that_is_done_again_has_other_noise() -> None:
    privacy = ExamplePrivacy(section(), 8, 0, {"a": 4, "b": 4})
    keys = {privacy.begin("a", 50, 1).key.key for _ in range(3)}
    assert len(keys) == 3
    assert privacy.begin("a", 50, 1).key.secret
    seeded = ExamplePrivacy(section(randomness="seeded"), 8, 0, {"a": 4, "b": 4})
    assert seeded.begin("a", 50, 1).key == seeded.begin("a", 50, 1).key
    others = {seeded.begin(name, 50, number).key.key for name in "ab" for number in (1, 2)}
    assert len(others) == 4
    assert not seeded.begin("a", 50, 1).key.secret
    assert not seeded.mechanism("a", 50).guarantee().valid


def test_a_client_without_planned_steps_has_no_mechanism() -> None:
    with pytest.raises(RecipeError, match="client 'c' trains in no planned round"):
        ExamplePrivacy(section(), 8, 0, {"a": 4}).begin("c", 50, 1)
