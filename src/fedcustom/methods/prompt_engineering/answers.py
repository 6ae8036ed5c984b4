"""Answer aggregation: pure functions that make one answer of several clients' answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .scorer import Matrix, log_softmax

Vector = np.ndarray[Any, np.dtype[np.float64]]


def similarity_weights(similarities: Matrix, temperature: float) -> Matrix:
    """Weights of (clients, queries) that sum to 1 over clients: softmax of similarity / temperature."""
    odds = np.exp((similarities - similarities.max(axis=0)) / temperature)
    weights: Matrix = odds / odds.sum(axis=0)
    return weights


def pooled_log_probabilities(answers: Sequence[Matrix], weights: Matrix) -> Matrix:
    """The logarithmic opinion pool (Genest and Zidek 1986): log q(l) = sum_k w_k log p_k(l) + constant, for
    each query.

    ``answers`` are (queries, labels) of each client, ``weights`` (clients, queries).
    """
    pooled: Matrix = np.einsum("kq,kql->ql", weights, np.stack(list(answers)))
    return log_softmax(pooled)


def medoid(vectors: Matrix, weights: Vector) -> int:
    """The answer most like all the others: argmax_i sum_j w_j cos(e_i, e_j), the first of equal ones.

    ``vectors`` are unit vectors (answers, width).
    """
    return int(np.argmax((vectors @ vectors.T) @ weights))


def nearest(similarities: Matrix, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Positions of the ``count`` nearest texts in each row of (queries, texts), the nearest last, so that it
    stands next to the query in a prompt (Liu et al. 2022). Of equally near ones the first is nearer.
    """
    order = np.argsort(-similarities, axis=1, kind="stable")[:, :count]
    return order[:, ::-1]
