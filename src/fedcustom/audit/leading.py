"""Tokens of a client whose change has no exact span: by the leading directions of its signs."""

from __future__ import annotations

import torch
from torch import Tensor


def leading_directions(rows: Tensor, count: int) -> Tensor:
    """So many leading right singular directions of the signs of a change's rows, (at most count, width).

    The first step of Adam from rest is the gradient's sign times the learning rate. Signs of a sum of few
    products of errors and inputs still have most of their size in the span of the inputs. Where there are
    fewer rows than inputs, the signs of the rows lie near the inputs all the same.

    Args:
        rows: What of a change is, up to its signs, a combination of inputs, (rows, width).
        count: How many; half of the width at most, so that not everything is near them.
    """
    _, values, basis = torch.linalg.svd(rows.double().sign(), full_matrices=False)
    kept = values > 1e-6 * values.max().clamp(min=1e-30)
    leading: Tensor = basis[kept][: max(1, min(count, rows.shape[1] // 2))]
    return leading.float()


def nearness(inputs: Tensor, directions: Tensor) -> Tensor:
    """The largest share over positions of an input's square that lies in the directions, (tokens,) for inputs
    of (tokens, positions, width).
    """
    unit = torch.nn.functional.normalize(inputs.float(), dim=-1)
    return (unit @ directions.T).square().sum(dim=-1).amax(dim=1)
