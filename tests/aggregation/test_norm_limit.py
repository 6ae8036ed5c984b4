"""The norm limit of changes, against norms in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedcustom.aggregation.norm_limit import ChangeSize, change_size, too_large

HONEST = [ChangeSize(1.0, 10), ChangeSize(2.0, 20), ChangeSize(3.0, 30), ChangeSize(0.5, 5)]


def test_the_size_of_a_change_is_the_norm_over_all_tensors() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(3, 4)), generator.normal(size=7)
    tensors = {
        "a": torch.from_numpy(a).float(),
        "b": torch.from_numpy(b).bfloat16(),
        "n": torch.ones(2).long(),
    }
    expected = np.sqrt((tensors["a"].double() ** 2).sum() + (tensors["b"].double() ** 2).sum())
    assert change_size(tensors, 3).norm == pytest.approx(float(expected), rel=1e-9)
    assert change_size(tensors, 3).steps == 3
    assert change_size({"w": torch.full((100,), 3.4e38)}).norm == pytest.approx(3.4e39, rel=1e-5)
    assert change_size({}).norm == 0.0


@pytest.mark.parametrize(("norm", "steps", "refused"), [
    (1.5, 10, False),
    (100.0, 10, False),
    (1e4, 10, True),
    (1e4, 10_000, False),  # as many steps as that take one far
    (500.0, 1, True),
    (9.0, 1, False),
    (2e6, 10**9, True),  # whatever it claims
    (float("inf"), 1, True),
    (float("nan"), 1, True),
])  # fmt: skip
def test_a_change_is_refused_by_its_norm_and_by_the_others(norm: float, steps: int, refused: bool) -> None:
    reason = too_large(ChangeSize(norm, steps), HONEST)
    assert (reason is not None) == refused, reason
    if reason:
        assert "its change has norm" in reason


def test_two_changes_are_not_compared_and_others_that_rest_are_no_measure() -> None:
    assert too_large(ChangeSize(1e5), HONEST[:2]) is None
    assert too_large(ChangeSize(1e5), [ChangeSize(0.0)] * 5) is None
    assert too_large(ChangeSize(1e5), HONEST, max_ratio=1e6) is None
    assert too_large(ChangeSize(10.0), HONEST[:2], max_norm=5.0) is not None


def test_a_change_like_the_others_passes_however_small_the_state_is() -> None:
    """A state that began as zeros, after one small step of the server."""
    assert too_large(ChangeSize(2.0, 20), HONEST, {"w": torch.tensor([1e-9])}) is None
    assert too_large(ChangeSize(2.0, 20), HONEST[:2], {"w": torch.tensor([1e-9])}) is not None
    assert too_large(ChangeSize(2.0, 20), [ChangeSize(0.0)] * 5, {"w": torch.tensor([1e-9])}) is not None
    assert too_large(ChangeSize(1e4, 10), HONEST, {"w": torch.tensor([1e9])}) is not None
