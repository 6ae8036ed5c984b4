"""The head of clients' sums: linear discriminant, and logistic regression that begins from the sums."""

from __future__ import annotations

import math

import torch
from scipy.optimize import brentq, minimize_scalar
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

LEAST_VARIANCE = 1e-12
"""Of the numbers of labels' means: the least that is looked for. Vectors of length 1 have far larger ones."""

CAUTION = 2.0
"""By how many standard errors the variance between labels' means is taken to be smaller than it seems."""

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
    means, within = class_moments(sums.sent, sums.totals, sums.scatter, sums.pieces)
    centre = sums.totals.sum(dim=0) / number
    squares = float(sums.all_scatter().diagonal().mean()) / number
    within = shrunk(within, max(1.0, sums.pieces - int((sums.sent > 0).sum())))
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
    is a public constant, :data:`SPREAD` / width for every number, in the directions of the labels' means.

    Of a label whose mean is the centre of all plus d, the sums give d + e, where e is noise. All that is
    known of d beforehand is the variance t of its numbers, which the sums of all labels tell (empirical
    Bayes; James and Stein 1961). With n examples the expected d is b (d + e), where
    b = n^2 t / (n^2 t + deviation^2). The label's logit is the discriminant of one number, (d + e) x, between
    the centre and the mean that is b (d + e) away. Vectors vary by SPREAD / width along d, but along e, whose
    direction is any, by 1 / width at most. So the weight is that without noise times
    a = b / (b + (1 - b) / SPREAD). A label with few examples for the noise is left with its share; without
    noise a and b are 1.

    Args:
        layer: Where the head is.
        counts: Noised numbers of examples, (classes,).
        totals: Noised sums, (classes, width).
        deviation: Of the noise in each of these numbers.
    """
    totals, classes, width = totals.double(), len(totals), totals.shape[1]
    sizes = _expected_counts(counts.double(), deviation)
    number, whole = sizes.sum()[None], totals.sum(dim=0)[None]
    among = torch.tensor([classes * deviation**2], dtype=torch.float64)
    variance = _likely_variance(whole, number, among)
    centre = _within_ball(_ridge(whole, number, among, variance))
    kept = sizes * number * variance / (number.square() * variance + among).clamp(min=LEAST_VARIANCE)
    rest = totals - sizes[:, None] * centre  # with noise of the label's total, less its share of all noise
    noise = deviation**2 * (1 - 2 * kept + classes * kept.square())
    variance = _likely_variance(rest, sizes, noise)
    means = _within_ball(centre + _ridge(rest, sizes, noise, variance))
    slopes = _ridge(rest, sizes, noise / SPREAD, variance)
    shares, strength = (sizes + COUNT) / (number + COUNT * classes), width / SPREAD
    bias = torch.log(shares) - strength / 2 * (slopes * (centre + means)).sum(dim=1)
    return {layer.weight: (strength * slopes).float(), layer.bias: bias.float()}


def _expected_counts(counts: Tensor, deviation: float) -> Tensor:
    """The expected numbers of examples, (classes,), by noised ones: of a normal distribution around each, cut
    at 0.
    """
    if not deviation:
        return counts.clamp(min=0)
    scaled = counts / deviation
    density = -(scaled.square() + math.log(2 * math.pi)) / 2
    return deviation * (scaled + torch.exp(density - torch.special.log_ndtr(scaled))).clamp(min=0)


def _likely_variance(totals: Tensor, sizes: Tensor, noise: Tensor) -> float:
    """The variance t that is likely where ``totals`` of (vectors, width) are ``sizes`` v, with noise of
    variances ``noise`` of (vectors,), and the numbers of all v are normal around 0 with variance t: up to
    1 / width, since no v is longer than 1. It is :data:`CAUTION` standard errors below the most likely one,
    so that noise alone rarely passes for a difference.
    """
    width = totals.shape[1]
    if not noise.all():
        return 1 / width
    factors, squares = sizes.square(), totals.square().sum(dim=1)

    def surprise(logarithm: float) -> float:
        variances = factors * math.exp(logarithm) + noise
        return float((width * variances.log() + squares / variances).sum())

    least, most = math.log(LEAST_VARIANCE), -math.log(width)
    best = float(minimize_scalar(surprise, bounds=(least, most), method="bounded").x)
    allowed = surprise(best) + CAUTION**2
    if surprise(least) <= allowed:
        return LEAST_VARIANCE
    return math.exp(float(brentq(lambda logarithm: surprise(logarithm) - allowed, least, best)))


def _ridge(totals: Tensor, sizes: Tensor, noise: Tensor, variance: float) -> Tensor:
    """The expected v, (vectors, width), by those totals; 0 where there are none of it::

    size t total / (size^2 t + noise)
    """
    whole = sizes.square() * variance + noise
    factors: Tensor = torch.where(sizes > 0, sizes * variance / whole, 0.0)[:, None]
    return totals * factors


def _within_ball(vectors: Tensor) -> Tensor:
    """Vectors, (vectors, width), of which those that are longer than 1 have length 1."""
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / lengths.clamp(min=1.0)


def logistic_fit(layer: HeadLayer, sums: Sums, training: TrainingSettings) -> LogisticFit:
    """The logistic regression that follows the sums, of the examples in them."""
    return LogisticFit(
        torch.zeros(layer.classes, layer.width + 1),
        sums.all_scatter(),
        sums.totals.sum(dim=0),
        float(sums.sent.sum()),
        c=training.fit_head_c,
        steps=training.fit_head_steps,
    )


def head_of(layer: HeadLayer, point: Tensor) -> Tensors:
    """A point of the logistic regression, (labels, width + 1) with biases last, as the layer's tensors."""
    return {layer.weight: point[:, :-1].float(), layer.bias: point[:, -1].float()}


def with_shares(layer: HeadLayer, head: Tensors, fitted: Tensor, counts: Tensor) -> Tensors:
    """A head that was ``fitted`` to so many examples of each label, (labels,), for texts of which there are
    ``counts`` of each, (labels,): by Bayes' rule the logits change by the log of their ratio.
    """
    ratio = torch.log((counts + COUNT) / (fitted + COUNT))
    return {**head, layer.bias: head[layer.bias] + ratio.to(head[layer.bias].dtype)}


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
