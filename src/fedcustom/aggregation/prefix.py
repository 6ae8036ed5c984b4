"""Rules that merge clients' prefixes into one of the same length: slot matching and layer selection.

A prefix is (layers, 2, heads, length, size): the keys, ``[:, 0]``, and the values, ``[:, 1]``, of ``length``
slots in each layer and key-value head (grouped-query attention has fewer of them than query heads). Weights
w_k are positive and are normalised to sum to one. Everything is computed in float64 and returned in the
dtype of the input. The maths is in ``docs/prefix_rules.md``; stacking is in ``prefix_stacking.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..core.errors import UpdateError

WeightedPrefix = tuple[Tensor, float]
"""A client's prefix and its weight."""

ROUNDING = 1e-12  # a variance below this part of the mean square is rounding


class Matched(NamedTuple):
    """A prefix in the order of a reference: slot j was slot ``permutation[layer, head, j]``."""

    prefix: Tensor
    permutation: Tensor  # (layers, heads, length), int64


def match_slots(prefix: Tensor, reference: Tensor) -> Matched:
    """Put each layer's and head's slots in the order of the reference's that they are nearest to.

    Attention does not depend on the order of key-value pairs, so a prefix has length! equal forms in each
    layer and head, and a mean of prefixes is a mean of slots that belong together only after their orders
    agree. In each layer and head this minimises, by the Hungarian algorithm (Kuhn 1955)::

        sum_j c(pi(j), j),   c(i, j) = |k_i - k_j^ref|^2 / s_K^2 + |v_i - v_j^ref|^2 / s_V^2

    where s_K and s_V are the root mean square deviations of the reference's keys and values from their mean
    slot, so that keys and values weigh alike whatever their units. Where the reference's keys (or values) are
    all the same they cannot tell slots apart and are left out; where both are, the order is kept. Costs
    layers x heads x length^3 at worst.

    Raises:
        UpdateError: the prefix has another shape than the reference, or numbers that are not finite.
    """
    checked, target = check_prefix(prefix, "a prefix", reference.shape), reference.double()
    permutation = _permutation(checked, target, spread(target))
    return Matched(_permuted(prefix, permutation), permutation)


def matched_mean(prefixes: Iterable[WeightedPrefix], reference: Tensor) -> Tensor:
    """The weighted mean of prefixes whose slots were matched to the reference, usually the prefix that the
    round started from::

        sum_k w_k P_pi_k(x_k),   pi_k of match_slots(x_k, reference)

    Prefixes that differ only in the order of their slots give that prefix itself. Consumes them one by one,
    so memory does not grow with their number.

    Raises:
        UpdateError: see :func:`match_slots`; or there is no prefix, or a weight is not positive.
    """
    return _mean_matched(prefixes, reference.double(), spread(reference.double())).to(reference.dtype)


def barycentre(prefixes: Sequence[WeightedPrefix], start: Tensor, iterations: int = 20) -> Tensor:
    """The prefix that is nearest to all clients', whatever the order of their slots::

        argmin_x sum_k w_k min_pi sum_j c(pi(j), j)    with c between P_pi(x_k) and x as in match_slots

    This is the free-support Wasserstein barycentre of the clients' slots, each of mass one (Cuturi and Doucet
    2014, algorithm 2, where the optimal transport between equally many equal masses is a permutation). It is
    found by repeating :func:`matched_mean` from ``start`` until no slot moves, which never raises the sum but
    may end in a local minimum. Every slot of the result stands for exactly one slot of each client, so for
    mass sum_k w_k = 1, which a plain prefix can express. Here s_K^2 and s_V^2 are weighted means over the
    clients. Costs up to ``iterations`` times what :func:`matched_mean` costs, and holds all prefixes.

    Raises:
        UpdateError: see :func:`matched_mean`.
    """
    weights = normalised([weight for _, weight in prefixes])
    checked = [check_prefix(x, f"prefix {k}", start.shape) for k, (x, _) in enumerate(prefixes)]
    squares = [w * spread(x) ** 2 for w, x in zip(weights, checked, strict=True)]
    scale, current = torch.stack(squares).sum(0).sqrt(), start.double()
    for _ in range(iterations):
        following = _mean_matched(zip(checked, weights, strict=True), current, scale)
        if torch.equal(following, current):
            break
        current = following
    return current.to(start.dtype)


def layer_scores(change: Tensor, reference: Tensor | None = None) -> Tensor:
    """How much each layer of a prefix changed: (layers), float64::

        |d_l| / |x_l|       with the reference x that the change was made to
        |d_l| / |d|         without

    Norms are Euclidean, over a layer's keys and values. A layer whose reference is zero counts as changed
    beyond all others, more so the larger its change. An adaptation of FedPepTAO (Che et al. 2023), whose own
    scores need passes over a client's data; these need nothing but the change.

    Raises:
        UpdateError: the change has another shape than the reference, or numbers that are not finite.
    """
    shape = None if reference is None else reference.shape
    norms = check_prefix(change, "a change", shape).flatten(1).norm(dim=1)
    base = norms.norm() if reference is None else reference.double().flatten(1).norm(dim=1)
    scores: Tensor = norms / base.clamp(min=1e-30)
    return scores


def select_layers(change: Tensor, count: int, reference: Tensor | None = None) -> list[int]:
    """The ``count`` layers with the highest :func:`layer_scores`, in ascending order; of equal scores the
    lower layer goes first.

    Raises:
        ValueError: ``count`` is not from 1 to the number of layers.
        UpdateError: see :func:`layer_scores`.
    """
    if not 1 <= count <= len(change):
        raise ValueError(f"count must be from 1 to {len(change)} (the prefix's layers), not {count}")
    order = layer_scores(change, reference).argsort(descending=True, stable=True)
    return sorted(order[:count].tolist())


def mean_of_selected(updates: Iterable[tuple[Tensor, Sequence[int], float]], reference: Tensor) -> Tensor:
    """The mean of updates that each hold some layers only (after FedPepTAO, Che et al. 2023).

    An update is (tensor, layers, weight): ``tensor[i]``, (2, heads, length, size), is layer ``layers[i]`` of
    the client's prefix. With S_l the clients that sent layer l::

        x_l = sum_{k in S_l} w_k x_{k,l} / sum_{k in S_l} w_k     or the reference's x_l where S_l is empty

    Consumes the updates one by one.

    Raises:
        UpdateError: there is no update; layers repeat or are not the reference's; shapes do not fit; a number
            is not finite or a weight not positive.
    """
    total = torch.zeros_like(reference, dtype=torch.float64)
    mass = torch.zeros(len(reference), dtype=torch.float64, device=reference.device)
    number = -1
    for number, (tensor, layers, weight) in enumerate(updates):
        if len(set(layers)) != len(layers) or not all(0 <= layer < len(reference) for layer in layers):
            raise UpdateError(
                f"update {number}: layers {list(layers)} are not different ones of 0 to {len(reference) - 1}"
            )
        index = torch.tensor(list(layers), dtype=torch.long, device=reference.device)
        checked = check_prefix(tensor, f"update {number}", reference[index].shape)
        total[index] += checked * check_weight(weight, f"update {number}")
        mass[index] += weight
    if number < 0:
        raise UpdateError("there is no update to take the mean of")
    sent = mass > 0
    result = reference.clone()
    result[sent] = (total[sent] / mass[sent].view(-1, 1, 1, 1, 1)).to(reference.dtype)
    return result


# --- shared with prefix_stacking.py and prefix_memory.py ---


def check_prefix(prefix: Tensor, name: str, shape: Sequence[int] | None = None) -> Tensor:
    """The prefix in float64.

    Raises:
        UpdateError: it is not (layers, 2, heads, length, size), not of ``shape``, or not finite.
    """
    if prefix.dim() != 5 or prefix.shape[1] != 2:
        raise UpdateError(
            f"{name} has shape {tuple(prefix.shape)}, not that of (layers, 2, heads, length, size)"
        )
    if shape is not None and tuple(prefix.shape) != tuple(shape):
        raise UpdateError(f"{name} has shape {tuple(prefix.shape)}, not {tuple(shape)}")
    if not torch.isfinite(prefix).all():
        raise UpdateError(f"{name} holds numbers that are not finite")
    return prefix.double()


def check_weight(weight: float, name: str) -> float:
    """The weight.

    Raises:
        UpdateError: it is not a positive, finite number.
    """
    if not 0 < weight < math.inf:
        raise UpdateError(f"{name}: weight {weight} is not a positive number")
    return weight


def normalised(weights: Sequence[float]) -> list[float]:
    """The weights, scaled to sum to one.

    Raises:
        UpdateError: there is none, or one is not positive.
    """
    if not weights:
        raise UpdateError("there is no prefix to merge")
    total = math.fsum(check_weight(weight, f"prefix {k}") for k, weight in enumerate(weights))
    return [weight / total for weight in weights]


def spread(prefix: Tensor, mass: Tensor | None = None) -> Tensor:
    """The root mean square deviation of slots from their mean slot, (layers, 2, heads, 1, 1); zero where it
    is no more than rounding. ``mass``, (layers, heads, length), weighs the slots.
    """
    share = torch.ones_like(prefix[:, 0, :, :, 0]) if mass is None else mass
    share = (share / share.sum(-1, keepdim=True))[:, None, :, :, None]
    mean = (share * prefix).sum(3, keepdim=True)
    variance, square = (
        (share * x**2).sum(3, keepdim=True).mean(4, keepdim=True) for x in (prefix - mean, prefix)
    )
    return torch.where(variance > ROUNDING * square, variance, 0.0).sqrt()


def slot_features(prefix: Tensor, scale: Tensor) -> Tensor:
    """Each slot as one point [k / s_K; v / s_V], (layers, heads, length, 2 size); a half of scale 0 is 0."""
    scaled = torch.where(scale > 0, prefix / scale, 0.0)
    return torch.cat([scaled[:, 0], scaled[:, 1]], dim=-1)


def squared_distances(left: Tensor, right: Tensor) -> Tensor:
    """Between rows of (n, d) and (m, d): (n, m), exactly 0 for equal rows."""
    return torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist") ** 2


def _permutation(prefix: Tensor, reference: Tensor, scale: Tensor) -> Tensor:
    points, targets = slot_features(prefix, scale), slot_features(reference, scale)
    layers, heads, length = points.shape[:3]
    permutation = torch.empty(layers, heads, length, dtype=torch.long, device=prefix.device)
    for layer in range(layers):
        for head in range(heads):
            cost = squared_distances(targets[layer, head], points[layer, head])
            permutation[layer, head] = torch.as_tensor(linear_sum_assignment(cost.cpu().numpy())[1])
    return permutation


def _permuted(prefix: Tensor, permutation: Tensor) -> Tensor:
    return prefix.gather(3, permutation[:, None, :, :, None].expand_as(prefix))


def _mean_matched(prefixes: Iterable[WeightedPrefix], reference: Tensor, scale: Tensor) -> Tensor:
    total, mass = torch.zeros_like(reference), 0.0
    for number, (prefix, weight) in enumerate(prefixes):
        checked = check_prefix(prefix, f"prefix {number}", reference.shape)
        matched = _permuted(checked, _permutation(checked, reference, scale))
        total += matched * check_weight(weight, f"prefix {number}")
        mass += weight
    if not mass:
        raise UpdateError("there is no prefix to merge")
    return total / mass
