"""The noised mean: one client's part in it is bounded, whatever that client sends."""

from __future__ import annotations

import pytest
import torch

from fedcustom.aggregation.private_mean import bounded_sum, private_mean
from fedcustom.core.tensors import Tensors, norm, subtract
from fedcustom.privacy.clipping import Bound

GROUPS = {"own": ["a", "b"], "head": ["w"]}
FORMS = {"a": torch.empty(4, 3), "b": torch.empty(7), "w": torch.empty(2, 5)}
BOUNDS = {"own": Bound(0.5), "head": Bound(0.25, unit=True)}


def changes(count: int) -> list[Tensors]:
    generator = torch.Generator().manual_seed(5)
    return [
        {name: torch.randn(form.shape, generator=generator) for name, form in FORMS.items()}
        for _ in range(count)
    ]


def mean(given: list[Tensors], *, deviation: float = 0.0, expected: float = 5.0) -> Tensors:
    total = bounded_sum(iter(given), FORMS, GROUPS, BOUNDS)
    noise = {name: torch.ones(form.shape, dtype=torch.float64) for name, form in FORMS.items()}
    sizes = {group: bound.size for group, bound in BOUNDS.items()}
    return private_mean(total.tensors, noise, GROUPS, sizes, deviation=deviation, expected=expected)


def in_group(tensors: Tensors, group: str) -> float:
    return norm({name: tensors[name] for name in GROUPS[group]})


@pytest.mark.parametrize("scale", [1.0, -1.0, 1e6, -1e6, 1e-12, 1e37])
def test_one_clients_change_moves_the_sum_by_twice_the_bound_at_most(scale: float) -> None:
    before = changes(5)
    after = [*before[:4], {name: scale * tensor for name, tensor in before[4].items()}]
    moved = subtract(mean(after, expected=1.0), mean(before, expected=1.0))
    absent = subtract(mean(before[:4], expected=1.0), mean(after, expected=1.0))
    for group, bound in BOUNDS.items():
        assert in_group(moved, group) <= 2 * bound.size * (1 + 1e-6)
        assert in_group(absent, group) <= bound.size * (1 + 1e-6)


def test_what_is_within_the_bound_is_the_plain_mean_over_a_constant() -> None:
    few = [{name: 1e-3 * tensor for name, tensor in change.items()} for change in changes(3)]
    found = mean(few, expected=10.0)
    for name in ("a", "b"):
        expected = sum(change[name] for change in few) / 10.0  # and not by the three that answered
        torch.testing.assert_close(found[name], expected)
    units = [change["w"] / change["w"].norm() for change in few]
    torch.testing.assert_close(found["w"], 0.25 * sum(units) / 10.0)


def test_noise_is_in_units_of_the_bounds() -> None:
    silent, noisy = mean([], expected=4.0), mean([], deviation=3.0, expected=4.0)
    assert not any(tensor.any() for tensor in silent.values())
    assert torch.equal(noisy["a"], torch.full((4, 3), 0.5 * 3 / 4))
    assert torch.equal(noisy["w"], torch.full((2, 5), 0.25 * 3 / 4))


def test_changes_within_the_bound_are_counted_from_a_half() -> None:
    short = {name: 1e-6 * tensor for name, tensor in changes(1)[0].items()}
    found = bounded_sum([*changes(3), short], FORMS, GROUPS, {"own": Bound(0.5), "head": Bound(0.5)})
    assert found.within == {"own": 0.5 - 1.5, "head": 0.5 - 1.5}


def test_other_names_are_refused() -> None:
    with pytest.raises(KeyError):
        bounded_sum([{"a": torch.zeros(4, 3)}], FORMS, GROUPS, BOUNDS)
