"""Cohorts whose labels are nearly everybody's."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import fedcustom
from fedcustom.core.errors import RecipeError, UpdateError
from fedcustom.data.examples import ClientData, FederatedData, LearningTask
from fedcustom.federated.balanced_cohorts import balanced_cohorts
from fedcustom.federated.resolve import resolved
from fedcustom.federated.schedule import Plan, plan_rounds
from fedcustom.methods import Client, Work
from fedcustom.methods.tuning.local_training import batch_ranges
from fedcustom.recipe.recipe import load_recipe
from helpers.methods import classification_examples, make
from helpers.runs import rows_of, tensors_of


def unlikeness(counts: np.ndarray, groups: list[list[int]]) -> float:
    """How far groups are from their shares of everybody's examples of each label."""
    total = counts.sum(axis=0)
    return float(
        sum(
            np.sum((counts[g].sum(axis=0) - len(g) / len(counts) * total) ** 2 / np.maximum(total, 1))
            for g in groups
        )
    )


tables = arrays.arrays(
    np.int64,
    st.tuples(st.integers(1, 14), st.integers(1, 4)),
    elements=st.integers(0, 50),
)


@given(counts=tables, size=st.integers(1, 14), seed=st.integers(0, 9))
def test_every_client_is_in_one_cohort(counts: np.ndarray, size: int, seed: int) -> None:
    size = min(size, len(counts))
    cohorts = balanced_cohorts(counts.astype(float), size, np.random.default_rng(seed))
    assert [len(cohort) for cohort in cohorts] == [size] * (len(counts) // size)
    assert all(cohort == sorted(cohort) for cohort in cohorts)
    members = [client for cohort in cohorts for client in cohort]
    assert len(set(members)) == len(members)
    assert set(members) <= set(range(len(counts)))


@given(counts=tables, size=st.integers(1, 5), seed=st.integers(0, 9))
def test_no_swap_makes_cohorts_more_alike(counts: np.ndarray, size: int, seed: int) -> None:
    """Nor with those who are left over."""
    groups = balanced_cohorts(counts.astype(float), min(size, len(counts)), np.random.default_rng(seed))
    groups.append([i for i in range(len(counts)) if not any(i in cohort for cohort in groups)])
    found = unlikeness(counts, groups)
    for one, other in itertools.combinations(range(len(groups)), 2):
        for i, j in itertools.product(range(len(groups[one])), range(len(groups[other]))):
            swapped = [list(group) for group in groups]
            swapped[one][i], swapped[other][j] = swapped[other][j], swapped[one][i]
            assert unlikeness(counts, swapped) >= found - 1e-6 * max(1.0, found)


def test_clients_with_one_label_each() -> None:
    """Cohorts have all labels alike, though no client has more than one; each time they are others."""
    counts = np.zeros((30, 3))
    counts[np.arange(30), np.arange(30) % 3] = 20
    first, second = (balanced_cohorts(counts, 6, np.random.default_rng(seed)) for seed in (0, 1))
    for cohorts in (first, second):
        assert len(cohorts) == 5
        assert all(counts[cohort].sum(axis=0).tolist() == [40, 40, 40] for cohort in cohorts)
    assert sorted(first) != sorted(second)


def test_one_cohort_is_balanced_against_those_left_over() -> None:
    counts = np.kron(np.eye(4), np.full((2, 1), 20.0))  # eight clients, two of each label
    for seed in range(5):
        (cohort,) = balanced_cohorts(counts, 5, np.random.default_rng(seed))
        assert sorted(counts[cohort].sum(axis=0).tolist()) == [20, 20, 20, 40]


def test_skewed_clients() -> None:
    """A hundred clients of Dirichlet 0.1 with six labels, ten at a time: nearer to everybody's labels than
    cohorts at random are.
    """
    generator = np.random.default_rng(0)
    shares = generator.dirichlet(np.full(6, 0.1), size=100)
    sizes = 3 + generator.exponential(60, size=100)
    counts = np.stack([generator.multinomial(int(n), q) for n, q in zip(sizes, shares, strict=True)])
    everybody = counts.sum(axis=0) / counts.sum()

    def distance(cohorts: Any) -> float:
        return float(np.mean([np.abs(counts[c].sum(0) / counts[c].sum() - everybody).sum() for c in cohorts]))

    drawn = [generator.choice(100, size=10, replace=False) for _ in range(100)]
    balanced = balanced_cohorts(counts.astype(float), 10, generator)
    assert distance(balanced) < 0.5 * distance(drawn)


def plan_of(
    labels: dict[str, list[int]] | None,
    selection: str = "uniform",
    cohort: int = 4,
    **training: Any,
) -> Plan:
    recipe = load_recipe(
        {
            "clients": {"partition": "iid", "count": 12},
            "training": {"fit_head_rounds": [2, -1], **training},
            "rounds": {"count": 9, "clients_per_round": cohort, "selection": selection},
        }
    )
    clients = {f"c{i}": ClientData(f"c{i}", []) for i in range(12)}
    data = FederatedData(LearningTask("classification", ("a", "b")), clients, [], [], False)
    return plan_rounds(recipe, data, labels)


def test_plans() -> None:
    """At random until clients told of their labels; then each client once in three rounds of four."""
    labels = {f"c{i}": [10, 0] if i < 6 else [0, 10] for i in range(11)}  # one did not tell
    plan, uniform = (plan_of(labels, selection=way) for way in ("balanced", "uniform"))
    everybody = {f"c{i}" for i in range(12)}
    assert plan[0] == uniform[0]
    assert uniform == plan_of(None, selection="balanced")
    assert set(plan[1]) == set(plan[8]) == everybody
    for start in (2, 5):
        turn = [set(cohort) for cohort in plan[start : start + 3]]
        assert set.union(*turn) == everybody
        assert all(len(cohort) == 4 for cohort in turn)
        assert all(len(cohort & {f"c{i}" for i in range(6)}) == 2 for cohort in turn)
    assert plan[2:5] != plan[5:8]


def test_steps_are_the_mean_clients() -> None:
    """By the batch size; a recipe that counts steps itself is left alone. One client that claims to have very
    many examples does not make everybody's batches tiny.
    """
    labels = {f"c{i}": [10 * i, 7] for i in range(12)}  # 62 examples each, in the mean
    plan = plan_of(labels, "balanced", batch_size=16)
    amounts = [[assignment.amount for assignment in cohort.values()] for cohort in plan]
    assert amounts[2] == 4 * [Work(epochs=1, batches=4)]
    for number in (0, 1, 8):
        assert all(amount == Work(epochs=1) for amount in amounts[number])
    liar = plan_of({**labels, "c3": [10**9, 0]}, "balanced", batch_size=16)[2]
    assert {a.amount.batches for a in liar.values()} == {10 * 72 // 16}  # 72: the median client's
    counted = plan_of(labels, "balanced", local_steps=3)[2]
    assert all(assignment.amount == Work(steps=3) for assignment in counted.values())


def test_plans_that_fit_the_head_to_some_clients() -> None:
    """Others each time; what the other rounds do is as without."""
    some, everybody = plan_of(None, fit_head_clients=7), plan_of(None)
    assert [len(cohort) for cohort in some] == [4, 7, 4, 4, 4, 4, 4, 4, 7]
    assert set(some[1]) != set(some[8])
    assert all(some[i] == everybody[i] for i in range(9) if i not in (1, 8))
    assert plan_of(None, fit_head_clients=13) == everybody  # as where there are fewer sites than was thought


def test_a_cohort_of_all_clients_is_balanced_as_it_is() -> None:
    """What it gains is that clients make as many batches as each other."""
    labels = {f"c{i}": [10 * i, 7] for i in range(12)}  # 62 examples each, in the mean
    plan = plan_of(labels, "balanced", cohort=12, batch_size=16)
    assert all(set(cohort) == set(labels) for cohort in plan)
    assert [a.amount for a in plan[4].values()] == 12 * [Work(epochs=1, batches=4)]


@given(
    count=st.integers(1, 200), batches=st.integers(1, 12), passes=st.integers(1, 3), done=st.integers(0, 3)
)
def test_an_epoch_in_so_many_batches(count: int, batches: int, passes: int, done: int) -> None:
    start, amount = done * count, Work(epochs=passes, batches=batches)
    ranges = batch_ranges(count, start, 16, amount)
    assert [i for begin, end in ranges for i in range(begin, end)] == list(
        range(start, start + passes * count)
    )
    assert len(ranges) == passes * min(count, batches)
    sizes = {end - begin for begin, end in ranges}
    assert max(sizes) - min(sizes) <= 1


def test_a_run_and_its_second_half(small: dict[str, Any], tmp_path: Path) -> None:
    """What clients tell in the first round decides who is asked later, in a resumed run too."""
    recipe = {**small, "rounds": {"count": 6, "clients_per_round": 2}}
    overrides: dict[str, Any] = {"training.fit_head_rounds": [1], "rounds.selection": "balanced"}
    whole = fedcustom.run(recipe, overrides, out=tmp_path / "whole")
    cohorts = [set(row["cohort"]) for row in rows_of(whole.directory)[1:]]
    assert len(cohorts[0]) == 4
    assert cohorts[1] | cohorts[2] == cohorts[3] | cohorts[4] == cohorts[0]
    half = tmp_path / "half"

    class Interrupted(Exception):
        pass

    class Stop(fedcustom.federated.callbacks.Callback):
        def on_round_end(self, row: Any) -> None:
            if row["round"] == 3:
                raise Interrupted

    with pytest.raises(Interrupted):
        fedcustom.run(recipe, overrides, out=half, callbacks=[Stop()])
    again = fedcustom.run(recipe, overrides, out=half, resume=True)
    assert [set(row["cohort"]) for row in rows_of(half)[1:]] == cohorts
    ours, theirs = tensors_of(whole.directory), tensors_of(again.directory)
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds.selection": "balanced"}, "needs a round before the last"),
        ({"rounds.selection": "balanced", "training.fit_head_rounds": []}, "needs a round before the last"),
        ({"rounds.selection": "balanced", "training.fit_head_rounds": [-1]}, "needs a round before the last"),
        (
            {"rounds.selection": "balanced", "rounds.count": 9, "aggregation.rule": "median"},
            "which needs aggregation.rule = 'mean'",
        ),
        ({"rounds.selection": "fair"}, "'uniform' or 'balanced'"),
    ],
)
def test_what_balance_needs(small: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        resolved(load_recipe(small, change))


def test_a_large_batch_goes_through_in_parts(tiny: dict[str, str]) -> None:
    """Where clients train one by one, no pass has more rows than the recipe's batch; the step is the same."""
    client = Client("c", ClientData("c", classification_examples(10)))
    updates = []
    for size, amount in ((10, Work(epochs=1)), (4, Work(epochs=1, batches=1))):
        method = make(tiny["bert"], "prefix", training={"batch_size": size})
        task = method.configure(method.initialise(), 1, {"c": amount})["c"]
        rows: list[int] = []
        original = method.objective.loss

        def noted(model: Any, batch: Any, original: Any = original, rows: list[int] = rows) -> Any:
            rows.append(len(batch["labels"]))
            return original(model, batch)

        method.objective.loss = noted  # type: ignore[method-assign]
        updates.append(method.execute(task, Client(client.name, client.data)))
        assert rows == ([10] if size == 10 else [4, 4, 2])
    whole, parts = updates
    assert whole.steps == parts.steps == 1
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    assert parts.examples == 10
    for name, change in whole.tensors.items():
        assert parts.tensors[name].numpy() == pytest.approx(change.numpy(), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("batches", [0, -1, 2.0, True, "3"])
def test_a_client_checks_what_it_is_asked(tiny: dict[str, str], batches: Any) -> None:
    method = make(tiny["bert"], "prefix")
    task = method.configure(method.initialise(), 1, {"c": Work(epochs=1, batches=batches)})["c"]
    with pytest.raises(UpdateError, match=r"batches .* must be a whole number from 1"):
        method.execute(task, Client("c", ClientData("c", classification_examples(4))))
