"""Clipping: each group by itself, whatever is in it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcustom.core.tensors import norm
from fedcustom.privacy.clipping import Bound, bounded, clipped, next_bound

GROUPS = {"own": ("a", "b"), "head": ("w",)}


def change(scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: scale * torch.randn(4, 3, generator=generator) for n in ("a", "b", "w")}


def group_norm(tensors: dict[str, torch.Tensor], group: str) -> float:
    return norm({name: tensors[name] for name in GROUPS[group]})


@given(st.floats(1e-30, 1e30), st.floats(1e-3, 1e3))
def test_no_group_is_longer_than_its_bound(scale: float, size: float) -> None:
    bounds = {"own": Bound(size), "head": Bound(unit=True)}
    found = bounded(change(scale), GROUPS, bounds)
    for group in GROUPS:
        assert group_norm(found.tensors, group) <= 1 + 1e-12
        assert found.norms[group] == pytest.approx(group_norm(change(scale), group), rel=1e-5)
    assert group_norm(found.tensors, "head") == pytest.approx(1)
    expected = min(1.0, found.norms["own"] / size)
    assert group_norm(found.tensors, "own") == pytest.approx(expected)


def test_directions_stay() -> None:
    found = bounded(change(1e6), GROUPS, {"own": Bound(0.5), "head": Bound(2.0)}).tensors
    for group, names in GROUPS.items():
        for name in names:
            ratio = found[name] / change(1e6)[name].double()
            assert ratio.max() == pytest.approx(1 / group_norm(change(1e6), group), rel=1e-6)
            assert ratio.min() == pytest.approx(ratio.max())


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_what_has_no_direction_becomes_zeros(value: float) -> None:
    tensors = change() | {"w": torch.full((4, 3), value)}
    found = bounded(tensors, GROUPS, {"own": Bound(), "head": Bound(unit=True)}).tensors
    assert not found["w"].any()
    assert found["a"].any()


def test_largest_finite_numbers_do_not_overflow() -> None:
    tensors = {name: torch.full((4, 3), 3e38) for name in change()}
    found = bounded(tensors, GROUPS, {"own": Bound(), "head": Bound()}).tensors
    assert group_norm(found, "own") == pytest.approx(1)


def test_clipped_tensors_are_in_their_own_units_and_dtypes() -> None:
    tensors = {name: tensor.half() for name, tensor in change(3.0).items()}
    found = clipped(tensors, GROUPS, {"own": Bound(0.25), "head": Bound(100.0)})
    assert found["a"].dtype == torch.float16
    assert group_norm(found, "own") == pytest.approx(0.25, rel=1e-3)
    assert torch.equal(found["w"], tensors["w"])


@pytest.mark.parametrize(
    "groups", [{"own": ("a", "b")}, {"own": ("a", "b"), "head": ("w", "b")}, {"own": ("a", "b", "w", "x")}]
)
def test_every_tensor_is_in_one_group(groups: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(KeyError, match="differ"):
        bounded(change(), groups, {"own": Bound(), "head": Bound()})


def test_adaptive_bounds_come_to_the_quantile() -> None:
    norms = np.random.default_rng(0).lognormal(1.0, 0.5, size=1000)
    bound = 0.1
    for _ in range(200):
        bound = next_bound(bound, float((norms <= bound).mean()))
    assert bound == pytest.approx(np.median(norms), rel=0.02)
    assert next_bound(1.0, 7.0) == next_bound(1.0, 1.0) == pytest.approx(math.exp(-0.1))
    assert next_bound(1.0, -3.0) == pytest.approx(math.exp(0.1))
