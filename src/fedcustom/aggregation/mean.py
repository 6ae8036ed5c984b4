"""The weighted mean of updates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..core.tensors import Tensors

Weighted = tuple[Mapping[str, Tensor], float]
"""A state and its weight."""


def weighted_mean(states: Iterable[Weighted]) -> Tensors:
    """The mean of states with weights, as in FedAvg (McMahan et al. 2017, algorithm 1)::

        mean = sum_k w_k x_k / sum_k w_k

    The states are consumed one by one, so memory does not grow with their number. The sum runs in float32
    (float64 where the states are), the result has the first state's dtypes.

    Raises:
        ValueError: there is no state, or the weights are not positive.
        KeyError: states differ in names.
    """
    total = 0.0
    sums: Tensors = {}
    dtypes: dict[str, torch.dtype] | None = None
    for state, weight in states:
        if not weight > 0:
            raise ValueError(f"weights must be positive, not {weight}")
        if dtypes is None:
            dtypes = {name: tensor.dtype for name, tensor in state.items()}
            sums = {
                name: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * weight
                for name, tensor in state.items()
            }
        elif state.keys() != sums.keys():
            raise KeyError(f"states differ in names: {sorted(state.keys() ^ sums.keys())}")
        else:
            for name, value in sums.items():
                value.add_(state[name], alpha=weight)
        total += weight
        del state  # before the next one is made
    if dtypes is None:
        raise ValueError("there is no state to take the mean of")
    return {name: value.div_(total).to(dtypes[name]) for name, value in sums.items()}
