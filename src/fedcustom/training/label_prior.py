"""A client's label prior, taken out of what its training learns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def label_offset(
    labels: Sequence[int], classes: int, *, strength: float = 1.0, prior_count: float = 1.0
) -> Tensor:
    """``tau log((n_c + s) / (n + s C))`` for each label c, (classes,): what a client adds to its logits.

    Added in training alone, the log of the client's own label shares takes the label prior out of what the
    logits learn (balanced softmax, Ren et al. 2020, eq. 4; logit adjustment, Menon et al. 2021, eq. 10): a
    client then does not push down labels just because it has few or none of them. ``strength`` is Menon's
    tau. ``prior_count`` is s, the floor: so many examples are added to each label, so that no share is 0.
    With s near 0 a label that the client has never seen is left out of its softmax (FedRS, Li and Zhan 2021,
    at its limit); the larger s, the more such a label is pushed down as without adjustment.
    """
    counts = torch.bincount(torch.tensor(labels, dtype=torch.long), minlength=classes).double()
    shares = (counts + prior_count) / (len(labels) + prior_count * classes)
    return (strength * shares.log()).float()
