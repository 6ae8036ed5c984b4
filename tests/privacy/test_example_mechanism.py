"""Noise and batches of a client that hides its rows: statistics, calibration, and keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from fedcustom.core.errors import RecipeError
from fedcustom.privacy.accounting import Ledger, gaussian_epsilon, gaussian_mu
from fedcustom.privacy.clipping import groups_of
from fedcustom.privacy.example_mechanism import (
    ExampleMechanism,
    ExamplePrivacy,
    Releases,
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
    mechanism = ExampleMechanism(
        section(**more), rows, batch_size, Releases(100), more.get("noise_multiplier", 1.0)
    )
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
    found = example_mechanism(section(), rows=545, batch_size=64, planned=Releases(200))
    assert found.noise_multiplier == pytest.approx(1.256, abs=1e-3)
    assert found.epsilon(Releases(200)) == found.planned_epsilon == 8.0
    assert found.epsilon(Releases()) == 0.0
    spent = [found.epsilon(Releases(steps)) for steps in (1, 50, 100, 199)]
    assert spent == sorted(spent)
    assert spent[-1] < 8.0
    whole = example_mechanism(section(), rows=10, batch_size=64, planned=Releases(25))
    assert gaussian_epsilon(5 / whole.noise_multiplier, 1e-5) == pytest.approx(8.0, rel=1e-6)
    settings = section(noise_multiplier=1.256)
    fixed = example_mechanism(settings, rows=545, batch_size=64, planned=Releases(200))
    assert fixed.guarantee().epsilon == pytest.approx(8.0, rel=2e-3)


def test_a_second_accountant_agrees() -> None:
    from prv_accountant import PoissonSubsampledGaussianMechanism, PRVAccountant

    settings = section(noise_multiplier=1.1)
    found = example_mechanism(settings, rows=300, batch_size=30, planned=Releases(60))
    other = PRVAccountant(
        prvs=[PoissonSubsampledGaussianMechanism(sampling_probability=0.1, noise_multiplier=1.1)],
        max_self_compositions=[60],
        eps_error=0.01,
        delta_error=1e-10,
    )
    _, estimate, _ = other.compute_epsilon(delta=1e-5, num_self_compositions=[60])
    assert found.epsilon(Releases(60)) == pytest.approx(estimate, rel=0.01)


def with_head(rows: int, batch_size: int, steps: int, **more: Any) -> ExampleMechanism:
    return example_mechanism(
        section(**more), rows=rows, batch_size=batch_size, planned=Releases(steps, head_fits=1)
    )


def delta_of_losses(
    z: float, q: float, steps: int, head: float, *, removed: bool
) -> Callable[[float], float]:
    """Delta as a function of epsilon: the privacy loss of one sampled step on a grid, convolved by FFT with
    itself and with the normal loss of the sums. The row is ``removed``, or added.
    """
    width, size = 1e-3, 2**17
    edges = np.linspace(-12 * z, 12 * z + 1, 400_001)
    x = (edges[1:] + edges[:-1]) / 2
    without = np.diff(stats.norm.cdf(edges, scale=z))
    with_row = (1 - q) * without + q * np.diff(stats.norm.cdf(edges, loc=1, scale=z))
    loss = np.log1p(q * np.expm1((2 * x - 1) / (2 * z**2)))

    def on_grid(losses: np.ndarray, mass: np.ndarray) -> np.ndarray:
        places = np.rint(losses / width).astype(int) % size
        return np.fft.rfft(np.bincount(places, mass, minlength=size))

    step = on_grid(loss if removed else -loss, with_row if removed else without)
    ends = (np.arange(size + 1) - size // 2 - 0.5) * width
    mass = np.diff(stats.norm.cdf(ends, loc=1 / (2 * head**2), scale=1 / head))
    whole = np.fft.irfft(step**steps * on_grid((ends[1:] + ends[:-1]) / 2, mass), size)
    found = (np.arange(size) + size // 2) % size - size // 2

    def delta(epsilon: float) -> float:
        above = found * width > epsilon
        return float((whole[above] * -np.expm1(epsilon - found[above] * width)).sum())

    return delta


@pytest.mark.parametrize(
    ("rows", "batch", "steps", "share"), [(530, 64, 100, 0.13), (530, 64, 100, 0.5), (40, 16, 7, 0.3)]
)
def test_the_head_and_the_steps_spend_epsilon_together(
    rows: int, batch: int, steps: int, share: float
) -> None:
    """The sums have their share of mu^2. The whole delta is that of losses that are added up here."""
    found = with_head(rows, batch, steps, head_share=share)
    assert found.head_noise == pytest.approx(1 / (math.sqrt(share) * gaussian_mu(8.0, 1e-5)))
    assert found.planned_epsilon == 8.0
    alone = example_mechanism(section(), rows=rows, batch_size=batch, planned=Releases(steps))
    assert found.noise_multiplier > alone.noise_multiplier
    deltas = [
        delta_of_losses(found.noise_multiplier, batch / rows, steps, found.head_noise, removed=removed)
        for removed in (True, False)
    ]
    assert max(delta(8.0 * 1.01) for delta in deltas) < 1e-5 < max(delta(8.0 * 0.99) for delta in deltas)
    parts = [found.epsilon(done) for done in (Releases(0, 1), Releases(steps), Releases(steps - 1, 1))]
    assert parts[0] == pytest.approx(gaussian_epsilon(1 / found.head_noise, 1e-5))
    assert all(0 < part < 8.0 for part in parts)
    assert Ledger.of(found.events(Releases(steps, 2))).epsilon(1e-5) > 8.0


def test_of_whole_batches_mu_squared_adds() -> None:
    found = with_head(10, 64, 25)
    assert found.head_noise is not None
    mu = gaussian_mu(8.0, 1e-5)
    assert 25 / found.noise_multiplier**2 == pytest.approx(0.87 * mu**2, rel=1e-6)
    assert 1 / found.head_noise**2 == pytest.approx(0.13 * mu**2, rel=1e-9)


def test_a_head_beside_a_given_noise_has_the_same_share() -> None:
    found = with_head(10, 64, 25, noise_multiplier=5.0, head_share=0.2)
    assert found.head_noise is not None
    assert found.noise_multiplier == 5.0
    assert 1 / found.head_noise**2 == pytest.approx(0.2 * (1 / found.head_noise**2 + 25 / 25), rel=1e-6)


def test_a_client_that_only_helps_to_fit_spends_less() -> None:
    found = with_head(100, 10, 0)
    assert 0 < found.planned_epsilon < 8.0
    assert found.planned_epsilon == found.epsilon(Releases(head_fits=1))
    with pytest.raises(ValueError, match="no release for a head"):
        example_mechanism(section(), rows=9, batch_size=3, planned=Releases(4)).events(Releases(1, 1))


def test_noised_sums_have_white_noise_of_the_deviation_that_is_told() -> None:
    """Of one key, the noise of counts, totals and steps is independent; of another key it is other noise."""
    mechanism = with_head(100, 10, 5)
    assert mechanism.head_noise is not None
    sums = {"counts": torch.full((6000,), 3.0), "totals": torch.zeros(30, 200)}
    noised, deviation = RowPrivacy(mechanism, NoiseKey.seeded(0)).noised_sums(sums)
    assert deviation == pytest.approx(math.sqrt(2) * mechanism.head_noise)
    noise = {name: ((noised[name] - sums[name]).double() / deviation).flatten() for name in sums}
    for values in noise.values():
        assert stats.kstest(values.numpy(), "norm").pvalue > 1e-3
    other = RowPrivacy(mechanism, NoiseKey.seeded(1)).noised_sums(sums)[0]["counts"].double() / deviation
    steps = RowPrivacy(mechanism, NoiseKey.seeded(0)).noise(0, sums, groups_of(list(sums), set()))
    for pair in (
        (noise["counts"], noise["totals"]),
        (noise["counts"], other),
        (noise["counts"], steps["counts"]),
    ):
        assert abs(float(torch.corrcoef(torch.stack(pair))[0, 1])) < 4 / math.sqrt(6000)
    none = RowPrivacy(ExampleMechanism(section(), 9, 3, Releases(2), 1.0), NoiseKey.seeded(0))
    with pytest.raises(ValueError, match="no release for a head"):
        none.noised_sums(sums)


def test_a_delta_that_would_publish_rows_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"privacy.delta = 0.001: at most 1 / \(10 rows\) = 0.0002"):
        example_mechanism(section(delta=1e-3), rows=500, batch_size=10, planned=Releases(5))


def test_a_task_that_is_done_again_has_other_noise() -> None:
    planned = {name: Releases(4) for name in "ab"}
    privacy = ExamplePrivacy(section(), 8, 0, planned)
    keys = {privacy.begin("a", 50, 1).key.key for _ in range(3)}
    assert len(keys) == 3
    assert privacy.begin("a", 50, 1).key.secret
    seeded = ExamplePrivacy(section(randomness="seeded"), 8, 0, planned)
    assert seeded.begin("a", 50, 1).key == seeded.begin("a", 50, 1).key
    others = {seeded.begin(name, 50, number).key.key for name in "ab" for number in (1, 2)}
    assert len(others) == 4
    assert not seeded.begin("a", 50, 1).key.secret
    assert not seeded.mechanism("a", 50).guarantee().valid


def test_a_client_without_planned_steps_has_no_mechanism() -> None:
    with pytest.raises(RecipeError, match="client 'c' trains in no planned round"):
        ExamplePrivacy(section(), 8, 0, {"a": Releases(4)}).begin("c", 50, 1)
