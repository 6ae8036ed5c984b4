"""Logit adjustment: a client's label prior, taken out of its training (Menon et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def label_offset(
    labels: Sequence[int],
    classes: int,
    *,
    strength: float = 1.0,
    prior_count: float = 1.0,
    overall: Sequence[int] | None = None,
) -> Tensor:
    """``tau log((n_c + s) / (n + s C))`` for each label c, (classes,): what a client adds to its logits.

    Added in training alone, the log of the client's own label shares takes the label prior out of what the
    logits learn (balanced softmax, Ren et al. 2020, eq. 4; logit adjustment, Menon et al. 2021, eq. 10): a
    client then does not push down labels just because it has few or none of them. ``strength`` is Menon's
    tau. ``prior_count`` is s, the floor: so many examples are added to each label, so that no share is 0.
    With s near 0 a label that the client has never seen is left out of its softmax (FedRS, Li and Zhan 2021,
    at its limit); the larger s, the more such a label is pushed down as without adjustment.

    With ``overall``, the number of examples of each label at all clients that were asked and p_c the shares
    that follow from them, it is ``tau log(((n_c + s C p_c) / (n + s C)) / p_c)``: by Bayes' rule the
    difference between the client's labels and everybody's, so that the logits learn the shares p. A client
    whose shares are p adds nothing.
    """
    counts = torch.bincount(torch.tensor(labels, dtype=torch.long), minlength=classes).double()
    floor = prior_count * classes
    if overall is None:
        shares = (counts + prior_count) / (len(labels) + floor)
    else:
        # A client that was not counted knows of its own examples at least.
        everybody = torch.maximum(torch.tensor(overall, dtype=torch.float64), counts) + prior_count
        shares = (counts * everybody.sum() / everybody + floor) / (len(labels) + floor)
    return (strength * shares.log()).float()
