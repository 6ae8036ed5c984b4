"""Bounds of single rows' gradients, against loops over rows in double precision."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedcustom.privacy.clipping import Bound
from fedcustom.privacy.row_clipping import clipped_row_sums

GROUPS = {"own": ["a", "b"], "head": ["h"]}
SHAPES = {"a": (3, 2), "b": (4,), "h": (5,)}


def gradients(rows: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(rows, *shape, generator=generator) for name, shape in SHAPES.items()}


def norm_of(tensors: dict[str, Tensor], group: str) -> float:
    return math.hypot(*(float(tensors[name].double().norm()) for name in GROUPS[group]))


@given(
    st.integers(1, 9), st.integers(1, 4), st.integers(0, 99), st.floats(0.01, 100), st.booleans(), st.data()
)
@settings(max_examples=60, deadline=None)
def test_sums_of_rows_that_are_bounded_by_group(
    rows: int, clients: int, seed: int, size: float, unit: bool, data: st.DataObject
) -> None:
    owners = data.draw(st.lists(st.integers(0, clients - 1), min_size=rows, max_size=rows))
    given_ = gradients(rows, seed)
    bounds = {"own": Bound(size, unit), "head": Bound(2 * size)}
    expected = {name: torch.zeros(clients, *shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for row, owner in enumerate(owners):
        for group, names in GROUPS.items():
            length = math.hypot(*(float(given_[name][row].double().norm()) for name in names))
            bound = bounds[group]
            factor = bound.size / length if bound.unit or length > bound.size else 1.0
            for name in names:
                expected[name][owner] += factor * given_[name][row].double()
    found = clipped_row_sums(
        {name: tensor.clone() for name, tensor in given_.items()},
        torch.tensor(owners),
        clients,
        GROUPS,
        bounds,
    )
    for name, tensor in expected.items():
        assert torch.allclose(found[name].double(), tensor, rtol=1e-5, atol=1e-5 * size)


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("value", [1e6, 1e25, 3e38, math.inf, math.nan, 1e-45, 1e-38, 0.0, -1e6])
def test_no_row_has_more_than_its_bounds(value: float, unit: bool) -> None:
    """Whatever it holds; the others' part stays."""
    bounds = {"own": Bound(0.5, unit), "head": Bound(2.0, unit)}
    given_ = gradients(3, 0)
    without = clipped_row_sums(
        {name: tensor[1:].clone() for name, tensor in given_.items()},
        torch.zeros(2, dtype=torch.long), 1, GROUPS, bounds,
    )  # fmt: skip
    for tensor in given_.values():
        tensor[0] = value
    found = clipped_row_sums(given_, torch.zeros(3, dtype=torch.long), 1, GROUPS, bounds)
    part = {name: tensor[0] - without[name][0] for name, tensor in found.items()}
    for group in GROUPS:
        assert norm_of(part, group) <= bounds[group].size * (1 + 1e-5)


def test_tensors_without_a_gradient_are_passed_over() -> None:
    given_ = {"h": torch.ones(2, 5)}
    bounds = {"own": Bound(1.0), "head": Bound(1.0)}
    found = clipped_row_sums(given_, torch.tensor([0, 1]), 2, GROUPS, bounds)
    assert found.keys() == {"h"}
    assert torch.allclose(found["h"], torch.full((2, 5), 5**-0.5))
