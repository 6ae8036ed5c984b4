"""Balanced cohorts: clients whose labels, taken together, are close to the whole federation's."""

from __future__ import annotations

import numpy as np

SWEEPS = 20
"""How often each client is offered a swap at most; a handful settles most splits."""


def balanced_cohorts(counts: np.ndarray, size: int, generator: np.random.Generator) -> list[list[int]]:
    """Clients in cohorts of ``size``, each with nearly the same number of examples of every label.

    ``counts`` of (clients, labels) are the clients' examples of each label. From a random split, each client
    in turn changes places with the client of another group that lowers most, if any does, ::

        sum_g sum_c (S_gc - s_g / n N_c)^2 / N_c

    with s_g of n clients in group g, S_gc its examples of label c, and N_c those of all clients. Groups are
    the cohorts and, where ``size`` does not divide n, those who are left over this time. (Choosing cohorts by
    how alike their labels are is the idea of Fed-CBS, Zhang et al. 2023.) The cohorts come in random order.
    """
    clients, labels = counts.shape
    cohorts = clients // size
    group = np.empty(clients, dtype=int)
    group[generator.permutation(clients)] = np.arange(clients) // size  # the last group: who is left over
    scaled = counts / np.sqrt(np.maximum(counts.sum(axis=0), 1))
    excess = np.zeros((int(group.max()) + 1, labels))  # of each group, over its share of everybody's
    np.add.at(excess, group, scaled - scaled.mean(axis=0))
    for _ in range(SWEEPS):
        if not sum(_swap(one, scaled, group, excess) for one in range(clients)):
            break
    return [np.flatnonzero(group == number).tolist() for number in generator.permutation(cohorts)]


def _swap(one: int, scaled: np.ndarray, group: np.ndarray, excess: np.ndarray) -> bool:
    """Whether a client changed places with another; ``group`` and ``excess`` are then up to date."""
    change = scaled - scaled[one]  # what the one's group gains, and the other's loses
    before = excess[group[one]] - excess[group]
    gained = np.einsum("ij,ij->i", change, before + change)  # half of what the sum of squares gains
    gained[group == group[one]] = 0.0
    other = int(np.argmin(gained))
    if gained[other] > -1e-12:
        return False
    excess[group[one]] += change[other]
    excess[group[other]] -= change[other]
    group[one], group[other] = group[other], group[one]
    return True
