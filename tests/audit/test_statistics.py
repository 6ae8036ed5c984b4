"""Statistics of attacks, against independent computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest
from sklearn.metrics import roc_auc_score, roc_curve

from fedcustom.audit.statistics import auc, bootstrap, epsilon_bound, share_interval, true_positives, wilson

scores = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=30).map(np.array)


@given(scores, scores)
def test_areas_are_those_of_sklearn(members: np.ndarray, others: np.ndarray) -> None:
    truth = np.repeat([1, 0], [len(members), len(others)])
    wanted = roc_auc_score(truth, np.concatenate([members, others]))
    assert auc(members, others) == pytest.approx(wanted)


@given(scores, scores, st.sampled_from([0.0, 0.01, 0.1, 0.5]))
def test_true_positives_are_those_of_the_curve(
    members: np.ndarray, others: np.ndarray, false_positives: float
) -> None:
    truth = np.repeat([1, 0], [len(members), len(others)])
    wrong, right, _ = roc_curve(truth, np.concatenate([members, others]), drop_intermediate=False)
    wanted = right[wrong <= false_positives + 1e-12].max()
    assert true_positives(members, others, false_positives) == pytest.approx(wanted)


@given(st.integers(1, 200), st.data())
def test_intervals_of_proportions(trials: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, trials))
    wanted = binomtest(hits, trials).proportion_ci(0.95, method="wilson")
    assert wilson(hits, trials) == pytest.approx((wanted.low, wanted.high), abs=1e-6)


def test_bootstrap_intervals_hold_what_they_are_of() -> None:
    """Of normal scores one apart the area is Phi(1 / sqrt 2); 100 intervals hold it about 95 times."""
    generator, hits = np.random.default_rng(0), 0
    truth = 0.5 * (1 + math.erf(0.5))
    for seed in range(40):
        members, others = generator.normal(1, 1, 60), generator.normal(0, 1, 60)
        low, high = bootstrap(auc, members, others, seed)
        assert low < auc(members, others) < high
        hits += low <= truth <= high
    assert hits >= 34
    values = generator.normal(0.5, 0.1, 400)
    low, high = share_interval(values, 0)
    assert (high - low) == pytest.approx(2 * 1.96 * 0.1 / 20, rel=0.15)


@pytest.mark.parametrize("guesses", [10, 50, 400])
def test_epsilon_of_guesses_that_are_all_right(guesses: int) -> None:
    """p^r = 0.05 with p = e^eps / (1 + e^eps) and no delta."""
    p = 0.05 ** (1 / guesses)
    assert epsilon_bound(guesses, guesses, guesses, 0.0) == pytest.approx(math.log(p / (1 - p)), abs=1e-6)


@given(st.integers(1, 100), st.data())
def test_epsilon_is_the_edge_of_the_tail(guesses: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, guesses))
    bound = epsilon_bound(correct, guesses, guesses, 0.0)
    p = 1 / (1 + math.exp(-bound))
    tail = float(sum(binom.pmf(np.arange(correct, guesses + 1), guesses, p)))
    assert tail == pytest.approx(0.05, abs=1e-4) if bound else tail > 0.05
    assert epsilon_bound(correct, guesses, 2 * guesses, 1e-3) <= bound + 1e-9


def test_randomised_response_keeps_its_epsilon() -> None:
    """Guesses that are right with probability e^eps / (1 + e^eps) give at most eps in 95 of 100 cases."""
    generator, epsilon = np.random.default_rng(1), 1.0
    right = 1 / (1 + math.exp(-epsilon))
    bounds = [epsilon_bound(int(n), 300, 300, 1e-5) for n in generator.binomial(300, right, 100)]
    assert sum(bound > epsilon for bound in bounds) <= 10
    assert np.mean(bounds) > 0.6
