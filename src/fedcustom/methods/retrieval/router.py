"""Query routing: a classifier over clients, from sums that they send."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...aggregation.discriminant import class_moments, discriminant

RIDGE = 0.05
"""Part of the mean variance that is added to each direction of the covariance."""


@dataclass(frozen=True)
class Sums:
    """What a client sends of its questions' vectors x: their number n, sum x and sum x x^T, in float64."""

    count: int
    total: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, vectors: Tensor) -> Sums:
        """The sums of (questions, width)."""
        vectors = vectors.double()
        return cls(len(vectors), vectors.sum(dim=0), vectors.T @ vectors)


def fit_router(clients: Mapping[str, Sums]) -> tuple[Tensor, Tensor]:
    """Linear discriminant analysis of questions into clients, with a ridge: ``logits = x W^T + b``.

    As sums add up, this equals what one would compute from all questions in one place. Returns W of (clients,
    width) and b of (clients,), in the mapping's order.
    """
    sums = list(clients.values())
    counts = torch.tensor([each.count for each in sums], dtype=torch.float64)
    totals = torch.stack([each.total for each in sums])
    scatter = sum((each.scatter for each in sums), torch.zeros_like(sums[0].scatter))
    means, within = class_moments(counts, totals, scatter)
    within = within + RIDGE * within.diagonal().mean() * torch.eye(len(within), dtype=within.dtype)
    return discriminant(means, within, counts / counts.sum())


def mass_before(logits: Tensor, own: Tensor) -> Tensor:
    """For each question, the probability of the clients that come before its own one, (questions,)."""
    odds = torch.softmax(logits.double(), dim=1)
    mine = odds.gather(1, own.unsqueeze(1))
    return torch.where(odds > mine, odds, torch.zeros_like(odds)).sum(dim=1)


def threshold(masses: Tensor, recall: float) -> float:
    """The mass up to which clients must be asked so that a share ``recall`` of the questions reach their own
    client.
    """
    order = masses.sort().values
    return float(order[min(len(order), math.ceil(recall * len(order))) - 1])


def choose(logits: Tensor, mass: float) -> Tensor:
    """Whom to ask, (questions, clients): clients by falling probability while those before them have at most
    ``mass`` together; the likeliest always.
    """
    odds, order = torch.softmax(logits.double(), dim=1).sort(dim=1, descending=True)
    before = odds.cumsum(dim=1) - odds
    asked = before <= mass + 1e-12
    asked[:, 0] = True
    return torch.zeros_like(asked).scatter(1, order, asked)
