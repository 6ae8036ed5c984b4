"""Query perturbation by noise."""

from __future__ import annotations

from typing import Any

import numpy as np

Vectors = np.ndarray[Any, np.dtype[np.float32]]


def perturbed(vectors: Vectors, epsilon: float, generator: np.random.Generator) -> Vectors:
    """Vectors of (queries, width) plus noise of density proportional to ``exp(-epsilon |noise|)``.

    (n, epsilon)-DistanceDP (RemoteRAG, Cheng et al. 2024): for vectors x and x' at distance d, no answer is
    more than ``exp(epsilon d)`` times as likely for one as for the other. The noise has a uniform direction
    and a length drawn from Gamma(width, 1 / epsilon), width / epsilon on average: an epsilon of ten times the
    width moves a unit vector by a tenth of its length.
    """
    count, width = vectors.shape
    direction = generator.normal(size=(count, width))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    length = generator.gamma(width, 1 / epsilon, size=(count, 1))
    return (vectors + direction * length).astype(np.float32)
