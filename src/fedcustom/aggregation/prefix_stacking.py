"""Prefix stacking: all clients' slots side by side, weighted in the attention itself, and its compression
back to a set length.

Shapes and weights are as in ``prefix.py``; the derivations are in ``docs/prefix_rules.md``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .prefix import WeightedPrefix, check_prefix, normalised, slot_features, spread, squared_distances

CANDIDATES = 16  # slots that the clustering's start tries for each cluster


class Stacked(NamedTuple):
    """A prefix whose slots' attention logits have a bias: slot i acts like exp(bias_i) equal slots."""

    prefix: Tensor  # (layers, 2, heads, slots, size)
    bias: Tensor  # (layers, heads, slots)


def stack_prefixes(prefixes: Iterable[WeightedPrefix]) -> Stacked:
    """Concatenate clients' prefixes along length, with the bias log(w_k) for each slot of client k, w_k
    summing to one (the analogue for prefixes of FLoRA's stacking, Wang et al. 2024).

    Let a query of one layer and head give client k's attention the numerator N_k, the normaliser D_k and the
    output o_k = N_k / D_k, over the client's slots and the input's own keys. The stacked attention gives::

        o = sum_k w_k N_k / sum_k w_k D_k = sum_k w_k D_k o_k / sum_k w_k D_k

    since the input's own keys enter with weight sum_k w_k = 1. So it is a convex combination of the clients'
    outputs with weights proportional to w_k D_k, and sum_k w_k o_k itself where the normalisers agree. The
    input's positions must stay those that follow on one client's prefix. Lengths may differ; the result grows
    with the number of clients: :func:`cluster_slots` brings it back.

    Raises:
        UpdateError: there is no prefix, prefixes differ in more than length, a number is not finite or a
            weight not positive.
    """
    held = list(prefixes)
    weights = normalised([weight for _, weight in held])
    first = held[0][0]
    for number, (prefix, _) in enumerate(held):
        length = prefix.shape[3:4]  # any
        check_prefix(prefix, f"prefix {number}", (*first.shape[:3], *length, *first.shape[4:]))
    bias = torch.cat(
        [
            torch.full((prefix.shape[3],), math.log(weight), dtype=torch.float64, device=prefix.device)
            for (prefix, _), weight in zip(held, weights, strict=True)
        ]
    ).to(torch.promote_types(first.dtype, torch.float32))
    layers, _, heads = first.shape[:3]
    return Stacked(torch.cat([x for x, _ in held], dim=3), bias.expand(layers, heads, -1).contiguous())


def cluster_slots(
    stacked: Tensor, bias: Tensor, length: int, start: Tensor | None = None, iterations: int = 50
) -> Stacked:
    """Merge a stacked prefix's slots into ``length``, by weighted k-means in each layer and head.

    Slots are points [k / s_K; v / s_V] as in :func:`~.prefix.match_slots`, with s from all slots, and masses
    m_i = exp(bias_i). Lloyd's algorithm starts from slots that are chosen one by one such that each lowers
    the inertia ``sum_i m_i min_c |x_i - x_c|^2`` as much as it can (k-means++ without chance); where
    ``start``, a prefix of ``length`` slots, leads to a lower inertia, that result is taken. A cluster c
    becomes the slot::

        k_c = sum_{i in c} m_i k_i / m_c,   v_c likewise,   m_c = sum_{i in c} m_i,   bias_c = log(m_c / n_c)

    where n_c is one, and more for the clusters of most mass when there are fewer clusters than ``length``:
    they are repeated. With its bias the result errs by second order in the clusters' width. A plain prefix
    has no bias, and no shift of k_c makes up for m_c at all queries: dropping the bias costs nothing where
    m_c = n_c, as where each cluster holds one slot of each client (mass sum_k w_k = 1), so for identical
    clients and for clients whose slots are permutations of one another. Where masses differ,
    :func:`~.prefix.barycentre` keeps each at one. Costs at most layers x heads x slots x length x
    size x (iterations + a few).

    Raises:
        ValueError: ``length`` is not from 1 to the number of slots.
        UpdateError: the stacked prefix or the start is malformed.
    """
    points = check_prefix(stacked, "the stacked prefix")
    slots = points.shape[3]
    if not 1 <= length <= slots:
        raise ValueError(f"length must be from 1 to {slots} (the stacked prefix's slots), not {length}")
    mass = bias.double().exp()
    scale = spread(points, mass)
    features = slot_features(points, scale)
    like = points[:, :, :, :length]
    starts = None if start is None else slot_features(check_prefix(start, "the start", like.shape), scale)

    merged = torch.empty_like(like)
    merged_bias = torch.empty_like(mass[:, :, :length])
    for layer in range(len(points)):
        for head in range(points.shape[2]):
            x, m = features[layer, head], mass[layer, head]
            centres = [x[greedy_start(x, m, length)]]
            if starts is not None:
                centres.append(starts[layer, head])
            _, nearest = min((lloyd(x, m, c, iterations) for c in centres), key=lambda result: result[0])
            share = torch.zeros(length, slots, dtype=m.dtype, device=m.device)
            share[nearest, torch.arange(slots, device=m.device)] = m
            source, copies = _copies(share.sum(1))
            weight = share.sum(1)[source]
            merged[layer, :, head] = (share[source] / weight[:, None]) @ points[layer, :, head]
            merged_bias[layer, head] = (weight / copies[source]).log()
    return Stacked(merged.to(stacked.dtype), merged_bias.to(bias.dtype))


# --- weighted k-means, shared with prefix_memory.py ---


def greedy_start(points: Tensor, mass: Tensor, count: int) -> Tensor:
    """Rows chosen one by one: of the candidates of most mass x squared distance to the chosen ones, the one
    that lowers the inertia most. The first is one of the rows nearest to the mean.
    """
    centre = (mass @ points / mass.sum())[None]
    score = -squared_distances(points, centre)[:, 0]
    nearest = torch.full_like(mass, math.inf)
    chosen = []
    for _ in range(count):
        candidates = score.argsort(descending=True, stable=True)[:CANDIDATES]
        trials = torch.minimum(nearest[:, None], squared_distances(points, points[candidates]))
        best = (mass @ trials).argmin()
        chosen.append(candidates[best])
        nearest = trials[:, best]
        score = mass * nearest
    return torch.stack(chosen)


def lloyd(points: Tensor, mass: Tensor, centres: Tensor, iterations: int) -> tuple[float, Tensor]:
    """The inertia, and the nearest centre of each point, after Lloyd's algorithm; centres may end unused."""
    rows = torch.arange(len(points), device=points.device)
    nearest = torch.full_like(rows, -1)
    for _ in range(iterations):
        before, nearest = nearest, squared_distances(points, centres).argmin(1)
        if torch.equal(before, nearest):
            break
        share = torch.zeros(len(centres), len(points), dtype=mass.dtype, device=mass.device)
        share[nearest, rows] = mass
        total = share.sum(1, keepdim=True)
        centres = torch.where(total > 0, share @ points / total.clamp(min=1e-300), centres)
    return float((mass * ((points - centres[nearest]) ** 2).sum(1)).sum()), nearest


def _copies(mass: Tensor) -> tuple[Tensor, Tensor]:
    """Which cluster each slot of the result stands for, and how many slots each cluster has: one if it has
    mass, and the slots that are left one by one to the cluster of most mass a slot.
    """
    copies = (mass > 0).long()
    for _ in range(len(mass) - int(copies.sum())):
        ratio = torch.where(copies > 0, mass / copies.clamp(min=1), 0.0)
        copies[ratio.argmax()] += 1
    return torch.arange(len(mass), device=mass.device).repeat_interleave(copies), copies
