"""The span of a matrix's change: of which vectors are its rows combinations, up to rounding?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SPARE_DIRECTIONS = 8
"""Directions that a span must leave out, so that a vector which is not in it has a distance from it."""

COARSE = 0.03
"""The largest distance from the span, of a vector of length 1, that may be due to rounding."""

FLOAT32 = 2.0**-23

SUMMED = 4.0
"""How many times its own rounding is the error of a number that is a sum of products."""

INPUTS = 1e-5
"""Error of an input, at length 1, that is computed in another batch."""


@dataclass(frozen=True)
class Span:
    """The directions that a change resolves.

    Attributes:
        basis: Orthonormal, (rank, width).
        errors: By how much rounding turns each direction, as a distance at length 1, (rank,).
        limited: The change has as many directions as rows, so that there may be more than it shows.
        full: It has about as many as vectors have numbers: everything is in it.
    """

    basis: Tensor
    errors: Tensor
    limited: bool
    full: bool

    @classmethod
    def of(cls, change: Tensor, before: Tensor) -> Span | None:
        """That of a change's rows, (rows, width), of a matrix that was ``before`` and travels in float32;
        None where nothing moved by more than rounding.

        Rounding to float32 leaves an error of each number, uniform in its last place: a deviation of at most
        2^-23 |w| / sqrt(12), and a few times as much of the change, which is a sum of products. The largest
        singular value of such noise is about deviation (sqrt(rows) + sqrt(width)); directions below that are
        not resolved. To first order, noise turns a direction of singular value s by deviation sqrt(width)
        / s.
        """
        rows, width = change.shape
        if not change.numel() or not float(change.abs().max()):
            return None
        squares = before.double().square().mean() + (SUMMED * change.double()).square().mean()
        deviation = FLOAT32 * math.sqrt(float(squares) / 12)
        _, values, basis = torch.linalg.svd(change.double(), full_matrices=False)
        kept = values > deviation * (math.sqrt(rows) + math.sqrt(width))
        rank = int(kept.sum())
        if not rank:
            return None
        return cls(
            basis[kept],
            deviation * math.sqrt(width) / values[kept],
            limited=rank == rows,
            full=rank > width - SPARE_DIRECTIONS,
        )

    @property
    def visible(self) -> bool:
        """Whether it tells which vectors are in it."""
        return not self.limited and not self.full

    def holds(self, vectors: Tensor) -> Tensor:
        """Which vectors are in the span, as far as rounding lets anybody tell, (vectors,) for (vectors,
        width).
        """
        unit = torch.nn.functional.normalize(vectors.float(), dim=1)
        coarse = 1 - (unit @ self.basis.float().T).square().sum(dim=1) < COARSE**2
        found = torch.zeros(len(vectors), dtype=torch.bool)
        places = coarse.nonzero().flatten()
        near = torch.nn.functional.normalize(vectors[places].double(), dim=1)
        parts = near @ self.basis.T
        distances = (near - parts @ self.basis).norm(dim=1)
        allowed = 2 * (parts * self.errors).norm(dim=1) + INPUTS
        found[places] = (distances <= allowed) & (distances < COARSE)
        return found
