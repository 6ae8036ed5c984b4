"""Numbers as integers: exact sums, bounds, unbiased rounding that is the same everywhere."""

from __future__ import annotations

import hashlib
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcustom.core.errors import UpdateError
from fedcustom.privacy.secure_sum.fixed_point import FixedPoint, counts, rounding_key

KEY = rounding_key(0, 1, "a")


@pytest.mark.parametrize(("sites", "power"), [(1, 30), (2, 29), (3, 28), (4, 28), (5, 27), (64, 24)])
def test_the_scale_leaves_room_for_the_sum(sites: int, power: int) -> None:
    assert FixedPoint(8.0, sites).scale == 2.0**power / 8
    assert FixedPoint(8.0, sites, 64).scale == 2.0 ** (power + 32) / 8
    largest = np.full(1, -8.0)
    total = sum(
        (FixedPoint(8.0, sites).encode(largest, KEY).astype(np.uint64) for _ in range(sites)), np.zeros(1)
    )
    assert FixedPoint(8.0, sites).decode(total.astype(np.uint64).astype(np.uint32)) == [-8.0 * sites]


@given(
    values=st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=20),
    sites=st.integers(1, 64), bits=st.sampled_from([32, 64]), key=st.binary(min_size=32, max_size=32),
)  # fmt: skip
def test_rounding_is_to_a_neighbour(values: list[float], sites: int, bits: Any, key: bytes) -> None:
    fixed = FixedPoint(2.0, sites, bits)
    found = fixed.encode(np.array(values), key)
    assert found.dtype == (np.uint32 if bits == 32 else np.uint64)
    assert (found == fixed.encode(np.array(values), key)).all()
    signed = found.view(np.int32 if bits == 32 else np.int64).tolist()
    for value, whole in zip(values, signed, strict=True):
        assert abs(Fraction(whole) - Fraction(value) * Fraction(fixed.scale)) < 1


def test_rounding_is_right_on_average() -> None:
    fixed, value = FixedPoint(1.0, 1), 0.3 / 2**30
    found = fixed.encode(np.full(1_000_000, value), KEY)
    assert set(found.tolist()) == {0, 1}
    assert abs(float(found.mean()) - 0.3) < 5 * (0.21 / 1e6) ** 0.5  # five standard deviations


def test_rounding_is_the_same_everywhere_and_its_own_for_each_key() -> None:
    """The integers themselves are compared: a change of the stream would part simulation and deployment."""
    values = (np.arange(300_000) - 150_000) / 150_001  # exact by IEEE 754
    found = FixedPoint(1.0, 4).encode(values, KEY)
    digest = hashlib.sha256(found.astype("<u4").tobytes()).hexdigest()
    assert digest[:16] == "4c8bd91e3f6fffa8"
    other = FixedPoint(1.0, 4).encode(values, rounding_key(0, 1, "b"))
    difference = (found - other).view(np.int32)
    assert set(difference.tolist()) == {-1, 0, 1}


@pytest.mark.parametrize("value", [1.0000001, -2.0, float("nan"), float("inf")])
def test_what_is_beyond_the_bound_is_refused(value: float) -> None:
    with pytest.raises(UpdateError, match=r"a number of size .*: at most 1 is allowed"):
        FixedPoint(1.0, 3).encode(np.array([0.0, value]), KEY)


def test_bounds_and_sites_must_be_possible() -> None:
    for bound, sites in ((0.0, 3), (float("inf"), 3), (1.0, 0)):
        with pytest.raises(ValueError, match="must be positive"):
            FixedPoint(bound, sites)


def test_counts_stay_as_they_are() -> None:
    assert counts([0, 7, 2**29], 3).tolist() == [0, 7, 2**29]
    assert counts([2**60], 3, 64).dtype == np.uint64
    for value in (-1, 2**30):
        with pytest.raises(UpdateError, match="must be from 0 to 715827882 for 3 sites"):
            counts([value], 3)
