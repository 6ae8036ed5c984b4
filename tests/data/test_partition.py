"""Partitions: every example belongs to exactly one client, and the skew is what was asked for."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcustom.core.errors import DataError
from fedcustom.data.partition import fill_up, natural_partition, partition_examples
from fedcustom.data.settings import ClientSettings


def labels_of(rows: int, kinds: int, seed: int = 0) -> list[int]:
    return [*range(kinds), *np.random.default_rng(seed).integers(kinds, size=rows - kinds).tolist()]


@given(
    st.sampled_from(["iid", "dirichlet", "quantity", "pathological"]),
    st.integers(1, 20),
    st.integers(60, 300),
    st.integers(2, 6),
    st.sampled_from([0.05, 0.5, 10.0]),
    st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_every_example_exactly_once(
    kind: Any, count: int, rows: int, kinds: int, alpha: float, seed: int
) -> None:
    chosen = ClientSettings(
        partition=kind, count=count, alpha=alpha, labels_per_client=max(min(2, kinds), -(-kinds // count)),
        minimum_examples=1,
    )  # fmt: skip
    labels = labels_of(rows, kinds)
    parts = partition_examples(labels, chosen, seed)
    assert len(parts) == count
    assert sorted(i for part in parts for i in part) == list(range(rows))
    assert min(len(part) for part in parts) >= 1
    assert parts == partition_examples(labels, chosen, seed)


@given(st.lists(st.text(min_size=1, max_size=3), min_size=1, max_size=50))
def test_natural_clients_hold_what_names_them(names: list[str]) -> None:
    parts = natural_partition(names)
    assert list(parts) == sorted(set(names))
    assert sorted(i for part in parts.values() for i in part) == list(range(len(names)))
    assert all(names[i] == name for name, part in parts.items() for i in part)


def test_iid_clients_are_of_equal_size() -> None:
    parts = partition_examples([0] * 103, ClientSettings(partition="iid", count=10), 0)
    assert Counter(len(part) for part in parts) == {10: 7, 11: 3}


def test_a_smaller_alpha_skews_labels_more() -> None:
    labels = labels_of(4000, 4)

    def largest_share(alpha: float) -> float:
        parts = partition_examples(labels, ClientSettings(partition="dirichlet", count=20, alpha=alpha), 0)
        return float(np.mean([max(Counter(labels[i] for i in part).values()) / len(part) for part in parts]))

    assert largest_share(0.1) > 0.7 > largest_share(1.0) > 0.4 > largest_share(100.0)


def test_quantity_skew_changes_sizes_and_leaves_labels_mixed() -> None:
    labels = labels_of(4000, 4)
    parts = partition_examples(labels, ClientSettings(partition="quantity", count=10, alpha=0.3), 0)
    sizes = [len(part) for part in parts]
    assert max(sizes) > 5 * min(sizes)
    largest = max(parts, key=len)
    shares = Counter(labels[i] for i in largest)
    assert max(shares.values()) / len(largest) < 0.35


def test_pathological_clients_hold_few_labels() -> None:
    labels = labels_of(600, 6)
    parts = partition_examples(
        labels, ClientSettings(partition="pathological", count=12, labels_per_client=2), 0
    )
    assert all(len({labels[i] for i in part}) == 2 for part in parts)


def test_filling_up_takes_from_the_largest() -> None:
    assert fill_up([[0, 1, 2, 3, 4], [], [5]], 2) == [[0, 1], [4, 3], [5, 2]]


def test_filling_up_takes_from_the_largest_each_time() -> None:
    """Of equals, from the first; found without looking at all of them for every example."""
    generator = np.random.default_rng(0)
    for _ in range(100):
        clients, minimum = int(generator.integers(1, 30)), int(generator.integers(1, 5))
        rows = clients * minimum + int(generator.integers(0, 60))
        owners = np.minimum(generator.geometric(0.3, rows) - 1, clients - 1)
        parts = [np.flatnonzero(owners == client).tolist() for client in range(clients)]
        expected = [list(part) for part in parts]
        for part in expected:
            while len(part) < minimum:
                part.append(max(expected, key=len).pop())
        assert fill_up(parts, minimum) == expected


@pytest.mark.parametrize(
    ("settings_", "labels", "message"),
    [
        (
            {"partition": "iid", "count": 50},
            [0] * 100,
            "50 clients of at least 3 examples need 150; there are 100",
        ),
        ({"partition": "dirichlet", "count": 5}, [0] * 100, "needs labels"),
        (
            {"partition": "pathological", "count": 5, "labels_per_client": 9},
            [0, 1] * 50,
            "there are 2 labels",
        ),
        ({"partition": "pathological", "count": 1, "labels_per_client": 1}, [0, 1] * 50, "cannot hold"),
    ],
)
def test_impossible_partitions_are_refused(
    settings_: dict[str, Any], labels: list[int], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        partition_examples(labels, ClientSettings(**settings_), 0)
