"""Rules that merge the slots of clients' prefix memories: stacking, its compression, matching.

A slot reads an input x with its reader r_j and writes its writer v_j. Nothing is normalised, slots add up::

    o(x) = sum_j a(r_j, x) v_j
    a(r, x) = act(s r . x),   or with gates act(s g . x) (u . x) for r = (g, u)

A reader is a key, or a row D of a feed-forward network with its bias as the last number (the input then ends
in 1). Weights w_k are positive and are normalised to sum to one. Everything is computed in float64 and
returned in the dtype of the input. The maths is in ``docs/prefix_rules.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..core.errors import UpdateError
from .prefix import ROUNDING, check_weight, normalised, squared_distances
from .prefix_stacking import greedy_start, lloyd

CONDITION = 1e-4
"""Directions of slots' strengths that are weaker than this part of the strongest one are not refitted."""

SILENT = 1e-9
"""Part of the mean mass that a slot has at least, so that a reader with a zero writer has a cluster too."""


class Slots(NamedTuple):
    """Slots of several groups (heads, networks) of equally many each."""

    readers: Tensor  # (groups, slots, parts, in); parts: one, or gate and up
    writers: Tensor  # (groups, slots, out)

    def double(self) -> Slots:
        """The same in float64."""
        return Slots(self.readers.double(), self.writers.double())


WeightedSlots = tuple[Slots, float]
"""A client's slots and its weight."""


@dataclass(frozen=True)
class Reading:
    """How strongly slots read inputs: the activation, and the scale of what it is given."""

    activation: Callable[[Tensor], Tensor]
    scale: float = 1.0

    def strengths(self, readers: Tensor, inputs: Tensor) -> Tensor:
        """a(r_j, x) of readers (groups, slots, parts, in) and inputs (rows, in): (groups, rows, slots)."""
        result = self.activation(self.scale * (inputs @ readers[:, :, 0].mT))
        return result if readers.shape[2] == 1 else result * (inputs @ readers[:, :, 1].mT)

    def outputs(self, slots: Slots, inputs: Tensor) -> Tensor:
        """o(x) of every group, (groups, rows, out), at inputs of (rows, in)."""
        return self.strengths(slots.readers, inputs) @ slots.writers


def probes(count: int, size: int, *, biased: bool, seed: int = 0) -> Tensor:
    """Sample inputs of (count, size) from N(0, 1), float64; with ``biased`` the last number of each is 1.

    Queries and what normalisation layers give have numbers of about that size. For such inputs the mean
    squared difference of what two readers are given, ``E (r . x - r' . x)^2``, is ``|r - r'|^2``.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, size, generator=generator, dtype=torch.float64)
    if biased:
        inputs[:, -1] = 1
    return inputs


def stack_slots(clients: Iterable[WeightedSlots]) -> Slots:
    """All clients' slots side by side, with writers scaled by w_k: exactly the mean of their functions::

        sum_k sum_j a(r_kj, x) (w_k v_kj) = sum_k w_k o_k(x)

    Numbers of slots may differ. The result grows with the number of clients: :func:`compress_slots` brings it
    back.

    Raises:
        UpdateError: there are no slots, clients differ in more than the number of slots, a number is not
            finite or a weight not positive.
    """
    held = list(clients)
    weights = normalised([weight for _, weight in held])
    first = held[0][0]
    checked = [check_slots(slots, f"client {k}", first) for k, (slots, _) in enumerate(held)]
    writers = [weight * slots.writers for slots, weight in zip(checked, weights, strict=True)]
    return _like(Slots(torch.cat([slots.readers for slots in checked], 1), torch.cat(writers, 1)), first)


def cluster_readers(stacked: Slots, start: Slots) -> Slots:
    """Merge stacked slots into as many as ``start`` has, by weighted k-means on readers in each group.

    Slots that read alike add up, so a cluster's writer is the sum of its slots' writers. Its reader is their
    mean with masses ``m_i = |w_k v_i|^2``: where r_i gives way to r_c, the output at standard normal inputs
    changes by ``|w_k v_i| |r_i - r_c|`` in root mean square, times the activation's slope (without gates).
    Lloyd's algorithm starts as in :func:`~.prefix_stacking.cluster_slots`, and from the readers of ``start``;
    the lower inertia is taken.

    Clusters take the places of the readers of ``start`` (the state that the round began with) that they are
    nearest to, by the Hungarian algorithm. Places that are left, where there are fewer clusters, keep that
    reader with a writer of zero: they change nothing, and can be trained.

    Raises:
        UpdateError: see :func:`check_slots`.
    """
    like = stacked
    stacked, start = check_slots(stacked, "the stack"), check_slots(start, "the start", stacked)
    points, places = stacked.readers.flatten(2), start.readers.flatten(2)
    readers, writers = places.clone(), torch.zeros_like(start.writers)
    mass = stacked.writers.square().sum(-1)
    mass = mass + SILENT * mass.mean(1, keepdim=True)
    mass = torch.where(mass.sum(1, keepdim=True) > 0, mass, 1.0)
    count = places.shape[1]
    for group in range(len(points)):
        x, m = points[group], mass[group]
        starts = [x[greedy_start(x, m, count)], places[group]]
        _, nearest = min((lloyd(x, m, centres, iterations=50) for centres in starts), key=lambda r: r[0])
        belongs = torch.nn.functional.one_hot(nearest, count).T.to(m.dtype)
        belongs = belongs[belongs.any(1)]
        centres = (belongs * m) @ x / (belongs @ m)[:, None]
        cost = squared_distances(centres, places[group])
        order, taken = (torch.as_tensor(i) for i in linear_sum_assignment(cost.cpu().numpy()))
        readers[group, taken] = centres[order]
        writers[group, taken] = (belongs @ stacked.writers[group])[order]
    return _like(Slots(readers.view_as(start.readers), writers), like)


def compress_slots(stacked: Slots, start: Slots, reading: Reading, inputs: Tensor) -> Slots:
    """Bring a stack back to the number of slots of ``start``: :func:`cluster_readers`, and then the writers
    that bring the merged function nearest to the stack's at ``inputs`` of (rows, in)::

        V = V_c + A^+ (T - A V_c)      A: strengths of the clusters' readers; T: the stack's outputs

    This is the least-squares solution that changes the clusters' writers V_c least. Directions of A with
    singular values below ``CONDITION`` times the largest are left as they are, so that readers that are
    nearly equal do not get huge writers that cancel. A A^+ is a projection: the result is never farther from
    the stack at the inputs than the clusters are.

    Raises:
        UpdateError: see :func:`check_slots`.
    """
    clustered = cluster_readers(stacked.double(), start.double())
    inputs = inputs.double()
    strengths = reading.strengths(clustered.readers, inputs)
    missed = reading.outputs(stacked.double(), inputs) - strengths @ clustered.writers
    change = torch.linalg.pinv(strengths, rtol=CONDITION) @ missed
    better = _square(missed - strengths @ change) < _square(missed)  # not where both are rounding
    return _like(Slots(clustered.readers, clustered.writers + torch.where(better, change, 0.0)), stacked)


def match_memory(slots: Slots, reference: Slots) -> tuple[Slots, Tensor]:
    """Put each group's slots in the order of the reference's that they are nearest to; slot j of the result
    was slot ``permutation[group, j]``, the second value.

    o(x) does not depend on the order of slots. This minimises in each group, by the Hungarian algorithm::

        sum_j c(pi(j), j),   c(i, j) = |r_i - r_j^ref|^2 / s_R^2 + |v_i - v_j^ref|^2 / s_V^2

    where s_R and s_V are the root mean square distances of the reference's readers and writers from their
    means. Readers (or writers) that are all the same are left out, as writers are while they are zero.

    Raises:
        UpdateError: see :func:`check_slots`; or the numbers of slots differ.
    """
    checked, target = check_slots(slots, "the slots", reference, equal=True), reference.double()
    permutation = _permutation(checked, target)
    return _permuted(slots, permutation), permutation


def matched_slots_mean(clients: Iterable[WeightedSlots], reference: Slots) -> Slots:
    """The weighted mean of slots that were matched to the reference, usually those that the round started
    from. Clients whose slots differ in their order alone give those slots. Consumes the clients one by one.

    Raises:
        UpdateError: see :func:`match_memory`; or there is no client, or a weight is not positive.
    """
    target = reference.double()
    readers, writers = torch.zeros_like(target.readers), torch.zeros_like(target.writers)
    total = 0.0
    for number, (slots, weight) in enumerate(clients):
        checked = check_slots(slots, f"client {number}", reference, equal=True)
        matched = _permuted(checked, _permutation(checked, target))
        readers.add_(matched.readers, alpha=check_weight(weight, f"client {number}"))
        writers.add_(matched.writers, alpha=weight)
        total += weight
    if not total:
        raise UpdateError("there are no slots to merge")
    return _like(Slots(readers / total, writers / total), reference)


def check_slots(slots: Slots, name: str, like: Slots | None = None, *, equal: bool = False) -> Slots:
    """The slots in float64.

    Raises:
        UpdateError: the shapes do not fit each other, or those of ``like`` but for the number of slots (with
            ``equal``, that too); or a number is not finite.
    """
    readers, writers = slots
    if readers.dim() != 4 or writers.dim() != 3 or readers.shape[:2] != writers.shape[:2]:
        raise UpdateError(
            f"{name}: readers must be (groups, slots, parts, in) and writers (groups, slots, out), not "
            f"{tuple(readers.shape)} and {tuple(writers.shape)}"
        )
    if like is not None:
        count = like.readers.shape[1] if equal else readers.shape[1]
        for found, wanted in ((readers, like.readers), (writers, like.writers)):
            allowed = (wanted.shape[0], count, *wanted.shape[2:])
            if tuple(found.shape) != allowed:
                raise UpdateError(f"{name}: slots of {tuple(found.shape)} where {allowed} is allowed")
    if not (torch.isfinite(readers).all() and torch.isfinite(writers).all()):
        raise UpdateError(f"{name} holds numbers that are not finite")
    return slots.double()


def _permutation(slots: Slots, reference: Slots) -> Tensor:
    scales = [_spread(half.flatten(2)) for half in reference]
    points, targets = (
        torch.cat(
            [torch.where(s > 0, half.flatten(2) / s, 0.0) for half, s in zip(each, scales, strict=True)], -1
        )
        for each in (slots, reference)
    )
    orders = [
        torch.as_tensor(linear_sum_assignment(squared_distances(goal, own).cpu().numpy())[1])
        for own, goal in zip(points, targets, strict=True)
    ]
    return torch.stack(orders).to(points.device)


def _spread(points: Tensor) -> Tensor:
    """The root mean square distance of (groups, slots, size) from their mean, (groups, 1, 1); zero where it
    is no more than rounding.
    """
    away = points - points.mean(1, keepdim=True)
    variance, square = (x.square().sum(-1).mean(1)[:, None, None] for x in (away, points))
    return torch.where(variance > ROUNDING * square, variance, 0.0).sqrt()


def _permuted(slots: Slots, permutation: Tensor) -> Slots:
    groups = torch.arange(len(permutation), device=permutation.device)[:, None]
    return Slots(slots.readers[groups, permutation], slots.writers[groups, permutation])


def _square(outputs: Tensor) -> Tensor:
    return outputs.square().sum((1, 2), keepdim=True)


def _like(slots: Slots, like: Slots) -> Slots:
    return Slots(slots.readers.to(like.readers.dtype), slots.writers.to(like.writers.dtype))
