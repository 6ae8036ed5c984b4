"""Low-rank factors of a LoRA delta: rank, scale, norm and compression."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class LoraFactors:
    """A change ``scale B A`` of one dense matrix of (out, in), as two factors (Hu et al. 2021).

    ``a`` is (rank, in), ``b`` is (out, rank); ``scale`` is alpha / rank, or alpha / sqrt(rank) in rsLoRA.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """How many rows A and columns B has."""
        return self.a.shape[0]

    def to(self, dtype: torch.dtype) -> LoraFactors:
        """The same factors in another dtype."""
        return replace(self, a=self.a.to(dtype), b=self.b.to(dtype))

    def change(self) -> Tensor:
        """The dense change ``scale B A`` of (out, in), in float32 (float64 where the factors are)."""
        exact = self.to(at_least_float32(self.a.dtype))
        return (exact.scale * exact.b) @ exact.a


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums of ``dtype`` are taken: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def layer_layout(change: Tensor, fan_in_fan_out: bool) -> Tensor:
    """A dense change of (out, in) as the layer stores its weight; its own inverse.

    ``nn.Linear`` stores (out, in); GPT-2's ``Conv1D`` stores (in, out), which PEFT calls ``fan_in_fan_out``.
    The result shares memory with ``change``.
    """
    return change.T if fan_in_fan_out else change


def with_scale(factors: LoraFactors, scale: float) -> LoraFactors:
    """The same change under another scale: ``B' = (s / s') B``, so that ``s' B' A = s B A``. A stays."""
    if scale == factors.scale:
        return factors
    b = factors.b.to(at_least_float32(factors.b.dtype)) * (factors.scale / scale)
    return LoraFactors(factors.a, b.to(factors.b.dtype), scale)


def pad_rank(factors: LoraFactors, rank: int) -> LoraFactors:
    """The same change with zero rows in A and zero columns in B up to ``rank``; the scale stays.

    Raises:
        ValueError: the factors have a larger rank.
    """
    missing = rank - factors.rank
    if missing < 0:
        raise ValueError(f"factors of rank {factors.rank} cannot be padded to rank {rank}")
    return replace(factors, a=pad(factors.a, (0, 0, 0, missing)), b=pad(factors.b, (0, missing)))


def truncate_rank(factors: LoraFactors, rank: int) -> LoraFactors:
    """The first ``rank`` rows of A and columns of B: what HetLoRA sends to a client of a smaller rank (Cho et
    al. 2024). The scale stays; :func:`with_scale` states the result in a client's own.

    Raises:
        ValueError: ``rank`` is below 1 or above the factors' rank.
    """
    if not 1 <= rank <= factors.rank:
        raise ValueError(f"factors of rank {factors.rank} cannot be truncated to rank {rank}")
    return replace(factors, a=factors.a[:rank], b=factors.b[:, :rank])


def compress_lora(factors: LoraFactors, rank: int) -> LoraFactors:
    """The best approximation of a change by one of ``rank``, without its dense matrix (FLoRIST, Ramesh and
    Dass 2025).

    With thin QR decompositions ``B = Q_B R_B`` and ``A^T = Q_A R_A``, and the singular value decomposition of
    the small core ``R_B R_A^T = U S V^T``, the first ``rank`` singular triples give::

        B' = Q_B U sqrt(S)      (out, rank)
        A' = sqrt(S) V^T Q_A^T  (rank, in)

    By Eckart and Young no matrix of this rank is nearer to ``B A`` in the Frobenius norm; the error is the
    norm of the dropped singular values. The largest entry of each column of B' is positive, so the signs do
    not depend on the machine. Rows and columns beyond the rank of the change are zero. The scale stays.

    Runs in float64; costs O((out + in) R^2 + R^3) for factors of rank R.

    Raises:
        ValueError: ``rank`` is below 1.
    """
    if rank < 1:
        raise ValueError(f"a rank must be 1 or more, not {rank}")
    left, right = torch.linalg.qr(factors.b.double()), torch.linalg.qr(factors.a.double().T)
    u, values, v = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    root = values[:rank].sqrt()
    b, a = (left.Q @ u[:, :rank]) * root, root[:, None] * (v[:rank] @ right.Q.T)
    signs = _column_signs(b)
    return pad_rank(LoraFactors(signs[:, None] * a, b * signs, factors.scale).to(factors.b.dtype), rank)


def orthonormal_rows(a: Tensor) -> Tensor:
    """A matrix (rank, in) whose rows are orthonormal and span those of ``a``: Gram and Schmidt, by QR.

    Of more rows than columns the last are zero. Orthonormal rows stay as they are, to rounding; where rows of
    ``a`` depend on each other, others take their place. Runs in float64; the result is float32, or float64
    where ``a`` is.
    """
    basis = _positive_qr(a.double().T)[0].T
    return pad(basis, (0, 0, 0, a.shape[0] - basis.shape[0])).to(at_least_float32(a.dtype))


def refactored(factors: LoraFactors) -> LoraFactors:
    """The same change with orthonormal rows in A and orthogonal columns in B, the longest first (FedSVD, Lee
    et al. 2025)::

        B A = U S V^T;   B' = U S,  A' = V^T

    The decomposition is that of a small core, as in :func:`compress_lora`, so that no dense matrix is formed.
    A direction of A in which the change is zero has no singular vector of its own: there A' keeps rows of A,
    made orthonormal to the others, so that it can be trained. With B = 0 and orthonormal rows A' is A. The
    rows of A' span what those of A span. Of more rows than columns the last are zero, with their columns of
    B. The largest entry of each column of B' is positive. Scale and dtype stay.

    Runs in float64; costs O((out + in) rank^2 + rank^3).
    """
    basis, triangle = _positive_qr(factors.a.double().T)
    core = factors.b.double() @ triangle.T
    u, values, v = torch.linalg.svd(core, full_matrices=False)
    least = values[0] * max(core.shape) * torch.finfo(torch.float64).eps
    found = int((values > least).sum())
    b = u[:, :found] * values[:found]
    signs = _column_signs(b) if found else b.new_ones(0)
    directions = signs * v[:found].T
    # QR of the found directions and of all others turns the latter orthogonal to the former.
    rest = _positive_qr(torch.cat([directions, torch.eye(len(core.T), dtype=core.dtype)], 1))[0][:, found:]
    turned = torch.cat([directions, rest], 1)
    missing = factors.rank - turned.shape[1]
    a = pad((basis @ turned).T, (0, 0, 0, missing))
    b = pad(b * signs, (0, factors.rank - found))
    return replace(factors, a=a.to(factors.a.dtype), b=b.to(factors.b.dtype))


def in_rows_of(b: Tensor, a: Tensor, rows: Tensor) -> Tensor:
    """B of (out, rank) for which ``B rows`` is ``b a``, where the rows of ``a`` lie in the span of ``rows``,
    which are orthonormal, or zero: ``b (a rows^T)``. Lengths stay where those of ``a`` are too. Runs in
    float64; the dtype is that of ``b``.
    """
    return (b.double() @ (a.double() @ rows.double().T)).to(b.dtype)


def change_norm(factors: LoraFactors) -> float:
    """The Frobenius norm of ``scale B A``, from the Gram matrices of the factors::

        ||B A||^2 = sum((B^T B) * (A A^T))

    Runs in float64; costs O((out + in) rank^2).
    """
    a, b = factors.a.double(), factors.b.double()
    return abs(factors.scale) * math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))


def frozen_bases(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B of (out, rank) and A of (rank, in) for changes ``B R A`` of which only R of (rank, rank) is trained.

    B holds the first left and A the first right singular vectors of ``weight`` (out, in), as LoRA-XS chooses
    them (Bałazy et al. 2024), but without its singular values in B: columns of B and rows of A are
    orthonormal, so ``||B R A|| = ||R||``. Fed-SB (Singhal et al. 2025) takes them from the first gradient of
    the full weight instead: pass that. The mean of R over clients is exact, because B and A are shared::

        sum_k w_k B R_k A = B (sum_k w_k R_k) A

    The largest entry of each column of B is positive. Where singular values coincide the vectors are not
    unique: sites with different hardware should be sent the bases, not compute them.

    Runs in float64 by the eigenvectors of the smaller of ``W W^T`` and ``W^T W``: O(out in min(out, in)),
    faster than a full decomposition. The result is float32, or float64 where the weight is.

    Raises:
        ValueError: ``rank`` is below 1 or above the smaller side of the weight.
    """
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"a weight of {tuple(weight.shape)} has no bases of rank {rank}")
    tall = weight.shape[0] > weight.shape[1]
    wide = weight.double().T if tall else weight.double()
    short = torch.linalg.eigh(wide @ wide.T).eigenvectors.flip(1)[:, :rank]
    # QR keeps the other side orthonormal even where singular values vanish.
    long = torch.linalg.qr(wide.T @ short)
    other = long.Q * _signs(long.R.diagonal())
    b, a = (other, short.T) if tall else (short, other.T)
    signs = _column_signs(b)
    dtype = at_least_float32(weight.dtype)
    return (b * signs).to(dtype), (signs[:, None] * a).to(dtype)


def _positive_qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The thin QR decomposition whose R has no negative number on its diagonal, which makes it unique where
    columns do not depend on each other.
    """
    found = torch.linalg.qr(matrix)
    signs = _signs(found.R.diagonal())
    return found.Q * signs, signs[:, None] * found.R


def _signs(values: Tensor) -> Tensor:
    """1 or -1 each; 1 for zero."""
    return torch.where(values < 0, -1.0, 1.0).to(values.dtype)


def _column_signs(matrix: Tensor) -> Tensor:
    """The sign of each column's entry of largest magnitude; of the first of those that differ by rounding."""
    size = matrix.abs()
    largest = (size >= size.amax(0) * (1 - 1e-9)).int().argmax(0)
    return _signs(matrix.gather(0, largest[None])[0])
