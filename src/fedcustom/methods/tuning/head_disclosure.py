"""Which of its texts a client lets into what it sends for a head to be fitted.

All that a client sends in such a round is sums over its texts. These rules keep a sum from being one text,
or nearly so. They are heuristics and no differential privacy; docs/classification.md says what they leave
open.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...data.tokens import TokenizedExample


def text_numbers(tokens: Sequence[TokenizedExample]) -> Tensor:
    """A number for each example, (examples,), the same for those that are one text to the model: whose tokens
    are equal once they are cut.
    """
    numbers: dict[bytes, int] = {}
    return torch.tensor([numbers.setdefault(row.source.tobytes(), len(numbers)) for row in tokens]).long()


def counted_rows(labels: Tensor, texts: Tensor, classes: int, least: int) -> Tensor:
    """Which rows are in a client's sums, (rows,): those of labels of which no text has more than one in
    ``least`` of the client's rows. Such a label has ``least`` different texts, and a text that is there many
    times does not stand out of its sum.

    ``labels`` and ``texts`` of (rows,) are the rows' labels and :func:`text_numbers`. With ``least = 1``
    these are all rows.
    """
    allowed = torch.zeros(classes, dtype=torch.bool)
    for label in set(labels.tolist()):
        own = texts[labels == label]
        allowed[label] = len(own) >= least * int(torch.bincount(own).max())
    return allowed[labels]


def sends_scatter(labels: Tensor, texts: Tensor, least: int) -> bool:
    """Whether a client sends the second moments of its counted rows too.

    These give the n vectors of its texts up to a rotation of n dimensions, R = Q X, of which the sums of its
    m labels fix m directions: (n - m) (n - m - 1) / 2 angles are left. At least ``least`` must be left for
    each text, since vectors of a known length give an equation each. With ``least = 1`` it always does.
    """
    if least == 1:
        return True
    number = _different(texts)
    free = number - _different(labels)
    return free * (free - 1) // 2 >= least * number


def sends_gradient(
    probabilities: Tensor, labels: Tensor, texts: Tensor, least: int, earlier: Sequence[Tensor] = ()
) -> bool:
    """Whether a client sends a head's gradient, of which row c is sum_i (p_ic - [y_i = c]) x_i.

    Not where it has fewer than ``least`` texts for each label of the run, since a gradient with as many rows
    as there are texts can be solved for them. Nor where one text has more than one in ``least`` of the
    weight, the sum of absolute factors of the x_i, in a row of the gradient, in its sum with the label's
    total, which was sent before, or in its difference from an ``earlier`` gradient. So a server that chooses
    heads to single out a text, in one exchange or by the difference of two of a fit, gets nothing either.

    ``probabilities`` p of (rows, classes) are the head's, ``earlier`` those of the same rows at the heads
    whose gradients were sent. With ``least = 1`` it always does.
    """
    if least == 1:
        return True
    classes = probabilities.shape[1]
    if _different(texts) < least * classes:
        return False
    truth = torch.nn.functional.one_hot(labels, classes).to(probabilities.dtype)
    return all(
        _spread(factors, texts, least)
        for factors in (probabilities, probabilities - truth, *(probabilities - other for other in earlier))
    )


def _spread(factors: Tensor, texts: Tensor, least: int) -> bool:
    """Whether no text has more than one in ``least`` of the weight in any column of (rows, classes)."""
    weights = torch.zeros(int(texts.max()) + 1, factors.shape[1], dtype=factors.dtype)
    weights.index_add_(0, texts, factors.abs())
    return bool((least * weights.amax(dim=0) <= (1 + 1e-9) * weights.sum(dim=0)).all())


def _different(numbers: Tensor) -> int:
    return len(set(numbers.tolist()))
