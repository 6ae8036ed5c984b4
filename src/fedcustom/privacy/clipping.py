"""Clipping: changes of bounded length, by groups of named tensors."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.tensors import Tensors

Groups = Mapping[str, Collection[str]]
"""Names of tensors that are bounded together, by group."""

OWN, HEAD = "own", "head"
"""The groups of a method's tensors, bounded apart: a head's gradient is many times that of a prefix."""

QUANTILE = 0.5
"""Share of norms that an adaptive bound is to lie above (Andrew et al. 2021)."""

RATE = 0.2
"""Of an adaptive bound's logarithm, its step for each unit of the share's error (the same)."""

FIRST = 0.1
"""An adaptive bound in the first round (the same)."""


def groups_of(names: Iterable[str], head: Collection[str]) -> dict[str, list[str]]:
    """The names by group, the head's and the method's own, of groups that have some."""
    listed = sorted(names)
    own, rest = [n for n in listed if n not in head], [n for n in listed if n in head]
    return {group: found for group, found in ((OWN, own), (HEAD, rest)) if found}


@dataclass(frozen=True)
class Bound:
    """Largest norm of a group. ``unit``: shorter ones are scaled up to it too (He et al. 2022, *Exploring
    the limits of DP deep learning with group-wise clipping*; Bu et al. 2022, arXiv 2206.07136).
    """

    size: float = 1.0
    unit: bool = False


@dataclass(frozen=True)
class Bounded:
    """Tensors in units of their group's bound, in float64: each group has norm 1 at most. ``norms`` are those
    of the groups before.
    """

    tensors: Tensors
    norms: dict[str, float]


def bounded(tensors: Mapping[str, Tensor], groups: Groups, bounds: Mapping[str, Bound]) -> Bounded:
    """Cut each group of tensors to its bound, in units of that bound.

    A group whose norm is zero, or not finite, becomes zeros. Lengths are taken in float64, so that no finite
    change overflows.

    Raises:
        KeyError: a tensor is in no group, or in two; a group lacks one of its tensors, or a bound.
    """
    listed = sorted(name for names in groups.values() for name in names)
    if listed != sorted(tensors):
        raise KeyError(f"tensors and groups differ: {sorted(set(listed) ^ set(tensors)) or 'one is twice'}")
    result: Tensors = {}
    norms: dict[str, float] = {}
    for group, names in groups.items():
        bound = bounds[group]
        exact = {name: tensors[name].detach().to("cpu", torch.float64) for name in names}
        norm = math.hypot(*(float(torch.linalg.vector_norm(tensor)) for tensor in exact.values()))
        norms[group] = norm
        if not 0 < norm < math.inf:
            result |= {name: torch.zeros_like(tensor) for name, tensor in exact.items()}
            continue
        factor = 1 / norm if bound.unit else min(1 / bound.size, 1 / norm)
        result |= {name: tensor * factor for name, tensor in exact.items()}
    return Bounded(result, norms)


def clipped(tensors: Mapping[str, Tensor], groups: Groups, bounds: Mapping[str, Bound]) -> Tensors:
    """The tensors themselves, each group of the length of its bound at most, in their own dtypes.

    Raises:
        KeyError: see :func:`bounded`.
    """
    found = bounded(tensors, groups, bounds).tensors
    sizes = {name: bounds[group].size for group, names in groups.items() for name in names}
    return {name: (tensor * sizes[name]).to(tensors[name]) for name, tensor in found.items()}


def next_bound(bound: float, share: float, *, quantile: float = QUANTILE, rate: float = RATE) -> float:
    """An adaptive bound for the next round, from the noised ``share`` of norms that were within it::

        bound exp(-rate (share - quantile))

    Andrew et al. 2021, *Differentially private learning with adaptive clipping* (arXiv 1905.03871), equation
    for C. The share is cut to [0, 1] first, which noise may have left.
    """
    return bound * math.exp(-rate * (min(1.0, max(0.0, share)) - quantile))
