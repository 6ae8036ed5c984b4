"""Rules that merge clients' LoRA factors of one matrix, and how far a merged change is from the ideal.

The ideal is the weighted mean of the clients' changes, ``sum_k w_k s_k B_k A_k``, with weights w_k that sum
to one and scales s_k = alpha / r_k. Every rule normalises the weights, takes its sums in float32 (float64
where the factors are), and gives factors in the first client's dtype. FFA-LoRA (Sun et al. 2024) and RoLoRA
(Chen et al. 2025) share one factor among all clients; for them the means of A and of B are exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from ..core.tensors import Tensors
from .lora_factors import LoraFactors, at_least_float32, change_norm, compress_lora, pad_rank, with_scale
from .mean import weighted_mean


@dataclass(frozen=True)
class LoraUpdate:
    """One client's factors for one matrix, and its weight in the mean."""

    client: str
    factors: LoraFactors
    weight: float = 1.0


def residual_lora(updates: Iterable[LoraUpdate]) -> tuple[LoraFactors, Tensor]:
    """The means of A and B, and the dense residual that makes them exact when it is added to the base weight
    (FedEx-LoRA, Singhal et al. 2025)::

        B = sum_k w_k B_k,  A = sum_k w_k A_k
        residual = sum_k w_k s B_k A_k - s B A      (out, in)

    The residual is (out, in), not the layer's own layout: see :func:`~.lora_factors.layer_layout`. It is
    taken against the means as they are sent, so it makes up for their rounding in half precision too. Since
    ``sum_k w_k A_k - A = 0``, it is ``s sum_k w_k (B_k - B)(A_k - A)``: zero where all clients share A or B.
    Consumes the updates one by one; costs one dense product each and holds two dense matrices.

    Raises:
        ValueError: there is no update; clients differ in rank or scale; or an update is not sound: factors
            that do not fit each other or the first client's (out, in), a weight or scale that is not
            positive.
    """
    first, stream = _checked(updates, equal_ranks=True)
    mean = weighted_mean(
        ({"a": one.factors.a, "b": one.factors.b, "change": one.factors.change()}, one.weight)
        for one in stream
    )
    merged = LoraFactors(mean["a"], mean["b"], first.factors.scale)
    return merged, mean["change"] - merged.change()


def stacked_lora(updates: Iterable[LoraUpdate], scale: float) -> LoraFactors:
    """Merge LoRA updates exactly by stacking their factors (FLoRA, Wang et al. 2024).

    The ideal change equals one product of rank ``R = sum_k r_k``, to be applied with ``scale`` s::

        B = [w_1 s_1/s B_1, ..., w_K s_K/s B_K]      (out, R)
        A = [A_1; ...; A_K]                          (R, in)

    Ranks and scales may differ between clients. The result grows with the number of clients;
    :func:`truncated_lora` brings it to a set rank.

    Raises:
        ValueError: see :func:`residual_lora`, but ranks and scales may differ; or ``scale`` is not positive.
    """
    stack, dtype = _stacked(updates, scale)
    return stack.to(dtype)


def truncated_lora(updates: Iterable[LoraUpdate], rank: int, scale: float) -> LoraFactors:
    """The factors of ``rank`` whose change ``scale B A`` is nearest to the ideal (FlexLoRA, Bai et al. 2024).

    FlexLoRA takes the singular value decomposition of the dense ideal change; here it is that of
    :func:`stacked_lora`'s factors (:func:`~.lora_factors.compress_lora`), which is the same and needs no
    dense matrix. It is exact if ``rank`` is at least the rank of the ideal change. A client of a smaller rank
    is sent the first rows and columns (:func:`~.lora_factors.truncate_rank`), the best of that rank.

    Memory and time grow with ``R = sum_k r_k``: O((out + in) R^2 + R^3).

    Raises:
        ValueError: see :func:`stacked_lora`; or ``rank`` is below 1.
    """
    stack, dtype = _stacked(updates, scale)
    return compress_lora(stack, rank).to(dtype)


def padded_lora(updates: Iterable[LoraUpdate], rank: int, scale: float) -> LoraFactors:
    """The means of factors padded with zeros to ``rank``, with sparsity weights (HetLoRA, Cho et al. 2024)::

        B = sum_k p_k [s_k/s B_k, 0],  A = sum_k p_k [A_k; 0],  p_k ~ w_k ||s_k B_k A_k||_F

    The paper has one scale and no w_k: with equal scales and weights this is its rule. Where scales differ,
    each client's B is first stated in the common ``scale`` s, so that its change stays what it was; the
    result is meant to be applied with s. If all changes are zero, p_k = w_k. Not exact. ``rank`` is at least
    the largest of the clients. Consumes the updates one by one; norms cost no dense matrix.

    Raises:
        ValueError: see :func:`residual_lora`, but ranks and scales may differ; or ``scale`` is not positive,
            or a client's rank is above ``rank``.
    """
    _, stream = _checked(updates)
    _check_positive("the merged scale", scale)

    def states() -> Iterator[tuple[Tensors, float]]:
        for one in stream:
            if one.factors.rank > rank:
                raise ValueError(f"client {one.client!r}: rank {one.factors.rank}; at most {rank} is allowed")
            norm = torch.tensor(change_norm(one.factors), dtype=torch.float64)
            padded = pad_rank(with_scale(one.factors, scale), rank)
            exact = padded.to(at_least_float32(padded.a.dtype))
            heavy = {"norm": norm, "norm a": exact.a * norm, "norm b": exact.b * norm}
            yield {"a": padded.a, "b": padded.b, **heavy}, one.weight

    mean = weighted_mean(states())
    if not mean["norm"] > 0:
        return LoraFactors(mean["a"], mean["b"], scale)
    a, b = mean["norm a"] / mean["norm"], mean["norm b"] / mean["norm"]
    return LoraFactors(a.to(mean["a"].dtype), b.to(mean["b"].dtype), scale)


def aggregation_error(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """How far merged changes are from the ideal ones, over all matrices together::

        sqrt(sum ||merged - ideal||^2) / sqrt(sum ||ideal||^2)

    Each pair is the merged and the ideal change of one matrix, dense and in the same layout; pairs are
    consumed one by one, so two dense matrices need to exist at a time. 0 where both sums are zero, infinite
    where only the ideal is. Sums run in float64.

    Raises:
        ValueError: the two of a pair differ in shape.
    """
    missed = wanted = 0.0
    for merged, ideal in pairs:
        if merged.shape != ideal.shape:
            raise ValueError(f"a merged change of {tuple(merged.shape)}, an ideal of {tuple(ideal.shape)}")
        missed += float((merged.double() - ideal.double()).square().sum())
        wanted += float(ideal.double().square().sum())
    if wanted == 0:
        return math.inf if missed else 0.0
    return math.sqrt(missed / wanted)


def lora_inner_products(updates: Iterable[LoraUpdate], start: LoraFactors | None = None) -> Tensor:
    """The inner products of clients' changes since ``start``, as a Gram matrix of (K, K) in float64::

        G_ij = <s_i B_i A_i - s_0 B_0 A_0, s_j B_j A_j - s_0 B_0 A_0>
        <B_i A_i, B_j A_j> = sum((B_i^T B_j) * (A_i A_j^T))

    Robust rules measure ``||change_i - change_j||^2 = G_ii + G_jj - 2 G_ij`` by it: different factors can
    make the same change, so distances between factors mean little. Gram matrices of several matrices add.
    Ranks and scales may differ; weights play no part. No dense matrix is formed: O((out + in) R^2) for
    ``R = sum_k r_k``, with all factors in memory.

    Raises:
        ValueError: see :func:`residual_lora`, but ranks and scales may differ; or ``start`` has another
            (out, in).
    """
    first, stream = _checked(updates)
    clients = [one.factors for one in stream]
    if start is not None:
        _check(LoraUpdate("start", start), first)
        clients.append(start)
    a = torch.cat([one.a.double() for one in clients])
    b = torch.cat([one.b.double() * one.scale for one in clients], dim=1)
    numbers = torch.arange(len(clients), device=a.device)
    owners = numbers.repeat_interleave(torch.tensor([one.rank for one in clients], device=a.device))
    rows = (owners == numbers[:, None]).double()
    if start is not None:  # every change takes the start's off
        rows = rows[:-1] - rows[-1]
    gram: Tensor = rows @ ((b.T @ b) * (a @ a.T)) @ rows.T
    return gram


def _stacked(updates: Iterable[LoraUpdate], scale: float) -> tuple[LoraFactors, torch.dtype]:
    """The stack in at least float32, and the first client's dtype."""
    first, stream = _checked(updates)
    _check_positive("the merged scale", scale)
    dtype = at_least_float32(first.factors.a.dtype)
    clients = list(stream)
    total = sum(one.weight for one in clients)
    shares = [one.weight / total * one.factors.scale / scale for one in clients]
    b = [one.factors.b.to(dtype) * share for one, share in zip(clients, shares, strict=True)]
    stack = LoraFactors(torch.cat([one.factors.a.to(dtype) for one in clients]), torch.cat(b, 1), scale)
    return stack, first.factors.a.dtype


def _checked(
    updates: Iterable[LoraUpdate], *, equal_ranks: bool = False
) -> tuple[LoraUpdate, Iterator[LoraUpdate]]:
    """The first update, and all of them again, each refused when its turn comes if it is not sound."""
    iterator = iter(updates)
    first = next(iterator, None)
    if first is None:
        raise ValueError("there is no update to merge")

    def stream(first: LoraUpdate = first) -> Iterator[LoraUpdate]:
        for update in chain([first], iterator):
            _check(update, first, equal_ranks=equal_ranks)
            yield update

    return first, stream()


def _check(update: LoraUpdate, first: LoraUpdate, *, equal_ranks: bool = False) -> None:
    """Raise ValueError unless the update is sound and fits the first."""
    where, factors, like = f"client {update.client!r}", update.factors, first.factors
    a, b = tuple(factors.a.shape), tuple(factors.b.shape)
    if not (len(a) == len(b) == 2 and a[0] == b[1]):
        raise ValueError(f"{where}: A must be (rank, in) and B (out, rank), not {a} and {b}")
    _check_positive(f"{where}: its weight", update.weight)
    _check_positive(f"{where}: its scale", factors.scale)
    other = f"where client {first.client!r} has"
    if (b[0], a[1]) != (like.b.shape[0], like.a.shape[1]):
        raise ValueError(
            f"{where}: out {b[0]} and in {a[1]}, {other} {like.b.shape[0]} and {like.a.shape[1]}"
        )
    if equal_ranks and factors.rank != like.rank:
        raise ValueError(f"{where}: rank {factors.rank}, {other} {like.rank}; this rule needs equal ranks")
    if equal_ranks and factors.scale != like.scale:
        raise ValueError(
            f"{where}: scale {factors.scale}, {other} {like.scale}; this rule needs equal scales"
        )


def _check_positive(what: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{what} must be positive, not {value}")
