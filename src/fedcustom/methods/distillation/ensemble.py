"""The soft labels of many clients as one: pure functions of probabilities.

In all of them ``probabilities`` is (clients, texts, labels), each row with sum 1, and ``weights`` is
(clients, texts): a client's weight, 0 where it was not asked. Every text must have a positive weight. The
result is (texts, labels), each row with sum 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .settings import Rule

SMALLEST = 1e-12


def combine(
    probabilities: Tensor,
    weights: Tensor,
    rule: Rule,
    *,
    temperature: float = 0.1,
    exponent: float = 1.5,
    smallest: float = SMALLEST,
) -> Tensor:
    """The ensemble's soft labels by a rule; ``temperature`` is that of ``sharpened``, ``exponent`` that of
    ``power``, ``smallest`` the least probability of ``logits``.
    """
    match rule:
        case "logits":
            return mean_of_logits(probabilities, weights, smallest)
        case "sharpened":
            return sharpened(mean(probabilities, weights), temperature)
        case "power":
            return power(mean(probabilities, weights), exponent)
        case "confidence":
            return mean(probabilities, weights * confidence(probabilities))
        case "entropy":
            return mean(probabilities, weights * certainty(probabilities))
    return mean(probabilities, weights)


def mean(probabilities: Tensor, weights: Tensor) -> Tensor:
    """``p = sum_k w_k p_k / sum_k w_k``: what the clients say on average."""
    total = (weights.unsqueeze(2) * probabilities).sum(0)
    return total / total.sum(1, keepdim=True)


def mean_of_logits(probabilities: Tensor, weights: Tensor, smallest: float = SMALLEST) -> Tensor:
    """``p = softmax(sum_k w_k z_k / sum_k w_k)`` (FedDF, Lin et al. 2020; FedMD, Li and Wang 2019).

    Logits z_k are log-probabilities up to a constant for each text, which softmax takes out. A client that is
    sure that a label is wrong has a veto, so what was rounded to 0 counts as ``smallest``.
    """
    shares = weights / weights.sum(0)
    return torch.softmax((shares.unsqueeze(2) * probabilities.clamp(min=smallest).log()).sum(0), dim=1)


def sharpened(probabilities: Tensor, temperature: float) -> Tensor:
    """``softmax(p / T)`` of mean probabilities p (texts, labels): DS-FL's entropy reduction (Itahara et al.
    2021, eq. 8), with T < 1 against the flat means of skewed clients.
    """
    return torch.softmax(probabilities / temperature, dim=1)


def power(probabilities: Tensor, exponent: float) -> Tensor:
    """``p^b / sum p^b`` of mean probabilities p (texts, labels): SCARLET's enhanced entropy reduction (Azuma
    et al. 2025). At b = 1 it is the mean; unlike a temperature it leaves 0 at 0 and 1 at 1.
    """
    raised = (probabilities / probabilities.amax(1, keepdim=True)) ** exponent
    return raised / raised.sum(1, keepdim=True)


def confidence(probabilities: Tensor) -> Tensor:
    """``max_c p_k(c)`` (clients, texts): a client counts by how sure it is of its first choice."""
    return probabilities.amax(2)


def certainty(probabilities: Tensor) -> Tensor:
    """``1 - H(p_k) / log C`` (clients, texts), with entropy H and C labels: 1 for a sure client, and (nearly)
    0 for one that knows nothing.
    """
    entropy = torch.special.entr(probabilities).sum(2)
    result: Tensor = (1 - entropy / math.log(probabilities.shape[2])).clamp(min=1e-6)
    return result
