"""Row clipping: sums of single rows' gradients, of which each row's groups are bounded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..core.tensors import Tensors
from .clipping import Bound, Groups

SMALLEST, LARGEST = 1e-30, 1e30
"""Norms beyond which a gradient counts as none: float32 could not hold its factor exactly."""


def row_factors(
    gradients: Mapping[str, Tensor], groups: Groups, bounds: Mapping[str, Bound]
) -> dict[str, Tensor]:
    """What each row's gradient is multiplied by, (rows,) in float64 for each group that has gradients.

    A group whose norm is not finite, or beyond :data:`SMALLEST` and :data:`LARGEST`, gets 0. Norms are taken
    in float64, so that no finite gradient overflows.

    Args:
        gradients: Those of each row, (rows, ...).
        groups: Which tensors are bounded together; names without a gradient are passed over.
        bounds: Each group's largest norm.
    """
    found: dict[str, Tensor] = {}
    for group, names in groups.items():
        given = [gradients[name] for name in names if name in gradients]
        if not given:
            continue
        device = given[0].device
        parts = [torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float64).to(device) for g in given]
        norms, bound = torch.linalg.vector_norm(torch.stack(parts), dim=0), bounds[group]
        factors = bound.size / norms
        if not bound.unit:
            factors = factors.clamp(max=1.0)
        found[group] = torch.where((norms >= SMALLEST) & (norms <= LARGEST), factors, 0.0)
    return found


def clipped_row_sums(
    gradients: Mapping[str, Tensor],
    owners: Tensor,
    count: int,
    groups: Groups,
    bounds: Mapping[str, Bound],
) -> Tensors:
    """The sums over each owner's rows of their gradients, every group of every row cut to its bound first:
    (count, ...). So a row moves its owner's sum by at most the bound of each group, whatever it holds.

    The ``gradients``, (rows, ...), are overwritten: they are the largest tensors of a step.

    Args:
        gradients: Those of each row, (rows, ...).
        owners: Whose each row is, (rows,), from 0 to ``count`` - 1.
        count: How many owners there are.
        groups: Which tensors are bounded together.
        bounds: Each group's largest norm.
    """
    factors = row_factors(gradients, groups, bounds)
    sums: Tensors = {}
    for group, names in groups.items():
        for name in names:
            if name not in gradients:
                continue
            rows = gradients[name]
            factor = factors[group].to(rows.device)
            rows[factor == 0] = 0  # a factor of 0 would leave what is not finite
            rows.mul_(factor.to(rows.dtype).view(-1, *[1] * (rows.dim() - 1)))
            total = rows.new_zeros(count, *rows.shape[1:])
            sums[name] = total.index_add_(0, owners.to(rows.device), rows)
    return sums
