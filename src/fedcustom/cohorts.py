"""Cohorts whose clients' labels, taken together, are nearly everybody's."""

from __future__ import annotations

import numpy as np

SWEEPS = 20
"""How often each client is offered a swap at most; a handful settles most splits."""


def balanced_cohorts(counts: np.ndarray, size: int, generator: np.random.Generator) -> list[list[int]]:
    """Clients in cohorts of ``size``, each with nearly the same number of examples of every label.

    ``counts`` of (clients, labels) are the clients' examples of each label. From a random split, each client
    in turn changes places with the client of another cohort that lowers most, if any does, ::

        sum_g sum_c S_gc^2 / N_c

    with S_gc the examples of label c in cohort g and N_c those of all clients; it is least where all cohorts
    are alike. (Choosing cohorts by how alike their labels are is the idea of Fed-CBS, Zhang et al. 2023.)
    Clients that are left over, where ``size`` does not divide their number, are drawn at random. The cohorts
    come in random order, a cohort's clients in theirs.
    """
    order = generator.permutation(len(counts))
    cohorts = len(counts) // size
    placed = order[: cohorts * size]
    cohort = np.full(len(counts), -1)
    cohort[placed] = np.arange(len(placed)) % cohorts
    shares = counts[placed] / np.sqrt(np.maximum(counts.sum(axis=0), 1))
    of = cohort[placed]
    sums = np.zeros((cohorts, counts.shape[1]))
    np.add.at(sums, of, shares)
    for _ in range(SWEEPS):
        if not sum(_swap(one, shares, of, sums) for one in range(len(placed))):
            break
    cohort[placed] = of
    return [np.flatnonzero(cohort == number).tolist() for number in generator.permutation(cohorts)]


def _swap(one: int, shares: np.ndarray, of: np.ndarray, sums: np.ndarray) -> bool:
    """Whether a client changed places with another; ``of`` and ``sums`` are then up to date."""
    change = shares - shares[one]  # what the one's cohort gains, and the other's loses
    gained = change @ sums[of[one]] - np.einsum("ij,ij->i", change, sums[of]) + np.square(change).sum(axis=1)
    gained[of == of[one]] = 0.0
    other = int(np.argmin(gained))
    if gained[other] > -1e-12:
        return False
    sums[of[one]] += change[other]
    sums[of[other]] -= change[other]
    of[one], of[other] = of[other], of[one]
    return True
