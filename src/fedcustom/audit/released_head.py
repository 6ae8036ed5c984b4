"""What a head that was fitted to sums says of single texts, to whoever has the states."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..data.examples import Example
from .attack import RoundView, Target
from .results import Finding, View
from .statistics import auc, bootstrap, wilson

MOST_PAIRS = 400
"""Pairs of a text that was in the sums and one that was not."""

VIEW: View = "state difference"


def head_findings(
    target: Target, seen: RoundView, examples: Sequence[Example], inside: Sequence[bool], vectors: Tensor
) -> list[Finding]:
    """Attacks on the rows of the head's last layer: a row is near the mean vector of its label.

    Each text that was in the sums is guessed to be the candidate with the largest inner product with its
    label's row, of vectors of length 1 less their mean. And texts of the sums are told from others with the
    same label by it.

    Args:
        examples: Candidates.
        inside: Which of them were in the sums, (candidates,).
        vectors: What goes into the layer, (candidates, width).
    """
    from ..methods import WeightTuning

    assert isinstance(target.method, WeightTuning)
    name = target.method.client.head.layer.weight
    before, after = seen.before.tensors.get(name), seen.after.tensors.get(name)
    if before is None or after is None or torch.equal(before.cpu(), after.cpu()):
        return []
    unit = torch.nn.functional.normalize(vectors.double(), dim=1)
    products = (unit - unit.mean(dim=0)) @ after.double().cpu().T
    labels, member = np.array([e.label for e in examples]), np.array(inside)
    guesses = products.argmax(dim=0).tolist()
    tried = int(member.sum())
    named = {guess for label, guess in enumerate(guesses) if member[guess] and labels[guess] == label}
    low, high = wilson(len(named), tried)
    many = len(examples)
    found = [
        Finding(
            "sums", VIEW, seen.number, "texts named by the released head", len(named) / tried, 1 / many,
            tried, many, f"of {tried} texts in the sums {len(named)} are the nearest candidate to a row of "
            "the released head", low, high,
        )
    ]  # fmt: skip
    pairs = _pairs(labels, member, target.seed)
    if len(pairs) >= 20:
        own = np.asarray(products)[np.arange(many), labels]
        members, others = own[[a for a, _ in pairs]], own[[b for _, b in pairs]]
        area = auc(members, others)
        low, high = bootstrap(auc, members, others, target.seed)
        verdict = "does not tell" if low <= 0.5 <= high else f"tells with AUC {area:.3f}"
        found.append(
            Finding(
                "sums", VIEW, seen.number, "AUC", area, 0.5, 2 * len(pairs), 2 * len(pairs),
                f"the released head {verdict} whether a text with a known label was in the sums", low, high,
            )
        )  # fmt: skip
    return found


def _pairs(labels: np.ndarray, member: np.ndarray, seed: int) -> list[tuple[int, int]]:
    """Places of a text that was in the sums and one of the same label that was not."""
    draw, found = np.random.default_rng([seed, 35]), []
    for label in np.unique(labels):
        ins, outs = (draw.permutation(np.flatnonzero((labels == label) & side)) for side in (member, ~member))
        found += list(zip(ins.tolist(), outs.tolist(), strict=False))
    return [found[i] for i in draw.permutation(len(found))[:MOST_PAIRS]]
