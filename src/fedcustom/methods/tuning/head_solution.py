"""The head of clients' sums: linear discriminant, and logistic regression that begins from the sums."""

from __future__ import annotations

import torch
from torch import Tensor

from ...aggregation.discriminant import class_moments, discriminant, shrunk
from ...aggregation.logistic import LogisticFit, loss_and_gradient
from ...core.errors import AggregationError
from ...core.tensors import Tensors, is_finite
from ...training.settings import TrainingSettings
from .head_layer import HeadLayer
from .head_messages import Sums

COUNT = 0.5
"""Added to each label's number of examples in the head's bias, so that a label without any is unlikely, and
not impossible."""

SPREAD = 10.0
"""Variance of a vector of length 1 within its label, times its width, that a noised head assumes: above the
largest there can be, for noise in the means adds to it. Chosen on Dolly's categories (docs/privacy.md)."""

LEAST_SHARE = 1e-3
"""Of the inputs' mean square: the least that counts as their variance, which float32 sums must resolve."""


def discriminant_head(layer: HeadLayer, sums: Sums) -> Tensors:
    """The layer's weight and bias as the linear discriminant of the sums.

    The covariance is shrunk by :func:`~fedcustom.aggregation.discriminant.shrunk`. The discriminant of the
    mean of all examples is subtracted, which changes no prediction and keeps weights small.

    Raises:
        AggregationError: no head comes of these sums.
    """
    number, width = float(sums.sent.sum()), len(sums.scatter)
    means, within = class_moments(sums.sent, sums.totals, sums.scatter)
    centre = sums.totals.sum(dim=0) / number
    squares = float(sums.scatter.diagonal().mean()) / number
    within = shrunk(within, max(1.0, number - int((sums.sent > 0).sum())))
    within += LEAST_SHARE * squares * torch.eye(width, dtype=torch.float64)
    shares = (sums.counts + COUNT) / (float(sums.counts.sum()) + COUNT * len(sums.counts))
    try:
        weight, bias = discriminant(means, within, shares)
        base_weight, base_bias = discriminant(centre[None], within, torch.ones(1, dtype=torch.float64))
    except RuntimeError as error:
        raise AggregationError(f"no head fits the clients' sums: {error}") from None
    fitted = {layer.weight: (weight - base_weight).float(), layer.bias: (bias - base_bias).float()}
    if not is_finite(fitted):
        raise AggregationError("the head fitted to the clients' sums is not finite: a sum was too large")
    return fitted


def private_head(layer: HeadLayer, counts: Tensor, totals: Tensor, deviation: float) -> Tensors:
    """The layer's weight and bias as a discriminant of noised sums of vectors of length 1, whose covariance
    is a public constant, :data:`SPREAD` / width for every number.

    Args:
        layer: Where the head is.
        counts: Noised numbers of examples, (classes,).
        totals: Noised sums, (classes, width).
        deviation: Of the noise in each of these numbers. A label that noise hides counts as twice that many;
            what noise adds to a mean's square on average is subtracted.
    """
    counts, totals, width = counts.double(), totals.double(), totals.shape[1]
    sizes = counts.clamp(min=max(1.0, 2 * deviation))
    means, centre = totals / sizes[:, None], totals.sum(dim=0) / max(1.0, float(counts.sum()))
    shares = counts.clamp(min=0) + COUNT
    squares = means.square().sum(dim=1) - width * (deviation / sizes) ** 2
    strength = width / SPREAD
    bias = torch.log(shares / shares.sum()) - strength / 2 * (squares - centre.square().sum())
    return {layer.weight: (strength * (means - centre)).float(), layer.bias: bias.float()}


def logistic_fit(layer: HeadLayer, sums: Sums, training: TrainingSettings) -> LogisticFit:
    """The logistic regression that follows the sums; its gradients are of all examples, not only of those in
    the sums.
    """
    examples = float(sums.counts.sum())
    more = examples / float(sums.sent.sum())
    return LogisticFit(
        torch.zeros(layer.classes, layer.width + 1),
        more * sums.scatter,
        more * sums.totals.sum(dim=0),
        examples,
        c=training.fit_head_c,
        steps=training.fit_head_steps,
    )


def head_of(layer: HeadLayer, point: Tensor) -> Tensors:
    """A point of the logistic regression, (labels, width + 1) with biases last, as the layer's tensors."""
    return {layer.weight: point[:, :-1].float(), layer.bias: point[:, -1].float()}


def local_head(layer: HeadLayer, vectors: Tensor, labels: Tensor, training: TrainingSettings) -> Tensors:
    """The head of a client that keeps everything to itself, from its vectors, (examples, width), and labels:
    what the server would make of its sums and gradients.
    """
    together = Sums.of(vectors, labels, layer.classes)
    if not training.fit_head_steps:
        return discriminant_head(layer, together)
    fit = logistic_fit(layer, together, training)
    while not fit.done:
        fit.tell(*loss_and_gradient(fit.point, vectors, labels), len(labels))
    return head_of(layer, fit.best)
