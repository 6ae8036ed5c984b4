"""The noised mean of bounded changes, by which one client's part in it is hidden."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.tensors import Tensors
from ..privacy.clipping import Bound, Groups, bounded


@dataclass(frozen=True)
class BoundedSum:
    """The sum of clients' changes in units of their groups' bounds, in float64, and by group how many more
    of them than half were within the bound: each counts 1/2, or else -1/2. Neither is noised yet.
    """

    tensors: Tensors
    within: dict[str, float]


def bounded_sum(
    changes: Iterable[Mapping[str, Tensor]],
    forms: Mapping[str, Tensor],
    groups: Groups,
    bounds: Mapping[str, Bound],
) -> BoundedSum:
    """Add up the changes, each group of each cut to its bound. One client's part has norm 1 at most in each
    group, whatever it sent. Consumes the changes one by one.

    Args:
        changes: Tensors of the names and shapes of ``forms``.
        forms: What a change looks like; the sum of none is zeros.
        groups: The names of tensors that are bounded together.
        bounds: By group.

    Raises:
        KeyError: a change has other names.
    """
    sums = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in forms.items()}
    within = dict.fromkeys(groups, 0.0)
    for change in changes:
        found = bounded(change, groups, bounds)
        for name, total in sums.items():
            total.add_(found.tensors[name])
        for group, norm in found.norms.items():
            within[group] += 0.5 if norm <= bounds[group].size else -0.5
        del change, found  # before the next one is made
    return BoundedSum(sums, within)


def private_mean(
    total: Mapping[str, Tensor],
    noise: Mapping[str, Tensor],
    groups: Groups,
    sizes: Mapping[str, float],
    *,
    deviation: float,
    expected: float,
) -> Tensors:
    """``size_g (total + deviation noise) / expected``, by group g, in float32.

    ``expected`` is how many clients take part on average: a divisor that depended on who answered would tell
    of it.
    """
    factors = {name: sizes[group] / expected for group, names in groups.items() for name in names}
    return {
        name: ((tensor + deviation * noise[name].double()) * factors[name]).to(torch.float32)
        for name, tensor in total.items()
    }
