"""Participation: turns that are far enough apart, and draws with the right probability."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedcustom.privacy.noise import NoiseKey
from fedcustom.privacy.participation import Participation

KEY = NoiseKey.seeded(0)


@given(st.integers(1, 50), st.data())
def test_cyclic_turns(clients: int, data: st.DataObject) -> None:
    asked, rounds = data.draw(st.integers(1, clients)), data.draw(st.integers(1, 40))
    found = Participation.of("cyclic", clients, asked, rounds)
    cohorts = found.cohorts(3, KEY)
    assert len(cohorts) == rounds
    for client in range(clients):
        turns = [t for t, cohort in enumerate(cohorts) if client in cohort]
        assert len(turns) <= found.turns
        assert all(after - before == found.groups for before, after in itertools.pairwise(turns))
        for until in range(1, rounds + 1):
            assert sum(t < until for t in turns) <= found.turns_until(until)
    assert all(len(cohort) <= asked for cohort in cohorts)
    everyone = sorted(itertools.chain.from_iterable(found.members(3)))
    assert everyone == list(range(clients))
    sizes = [len(group) for group in found.members(3)]
    assert max(sizes) - min(sizes) <= 1
    assert np.mean(sizes) == pytest.approx(found.expected)


def test_everybody_in_each_round_is_one_group() -> None:
    found = Participation.of("cyclic", 7, 7, 3)
    assert (found.groups, found.probability, found.turns) == (1, 1.0, 3)
    assert found.cohorts(0, KEY) == [list(range(7))] * 3


def test_poisson_draws_have_the_probability_and_are_independent() -> None:
    found = Participation.of("poisson", 200, 30, 400)
    cohorts = found.cohorts(0, NoiseKey.fresh())
    table = np.zeros((400, 200), dtype=bool)
    for t, cohort in enumerate(cohorts):
        table[t, cohort] = True
    assert found.expected == pytest.approx(30)
    assert found.turns == 400
    assert stats.binomtest(int(table.sum()), table.size, 0.15).pvalue > 1e-4
    in_rounds = [stats.binomtest(int(n), 200, 0.15).pvalue for n in table.sum(axis=1)]
    of_clients = [stats.binomtest(int(n), 400, 0.15).pvalue for n in table.sum(axis=0)]
    assert min(in_rounds) * 400 > 1e-4
    assert min(of_clients) * 200 > 1e-4
    sizes = table.sum(axis=1)
    assert sizes.var() == pytest.approx(200 * 0.15 * 0.85, rel=0.35)  # of a fixed size it would be 0


def test_poisson_draws_depend_on_the_key_and_not_on_the_seed() -> None:
    found = Participation.of("poisson", 50, 10, 20)
    assert found.cohorts(0, KEY) == found.cohorts(0, KEY)
    assert found.cohorts(0, NoiseKey.seeded(1)) != found.cohorts(0, KEY)
    assert Participation.of("cyclic", 50, 10, 20).cohorts(0, KEY) == Participation.of(
        "cyclic", 50, 10, 20
    ).cohorts(0, NoiseKey.seeded(1))


@pytest.mark.parametrize(("clients", "asked", "rounds"), [(5, 6, 1), (5, 0, 1), (5, 5, 0)])
def test_impossible_rounds_are_refused(clients: int, asked: int, rounds: int) -> None:
    with pytest.raises(ValueError, match="clients in"):
        Participation.of("cyclic", clients, asked, rounds)
