"""Server optimisers: the mean change of a round is a gradient that the server follows (Reddi et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..core.tensors import Tensors, combine, named, part, zeros_like
from .settings import AggregationSettings

DEFAULT_RATES = {"fedavg": 1.0, "fedavgm": 1.0, "nesterov": 0.7}
FIRST, SECOND = "first_moment/", "second_moment/"


def server_step(
    current: Mapping[str, Tensor],
    change: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    settings: AggregationSettings,
) -> tuple[Tensors, Tensors]:
    """The next global state, and the optimiser's moments, from the cohort's combined change.

    With the change ``d``, momentum ``b1``, second momentum ``b2``, learning rate ``eta`` and adaptivity
    ``tau`` (Reddi et al. 2021, algorithm 2; FedAvgM: Hsu et al. 2019; nesterov, the outer step of DiLoCo:
    Douillard et al. 2023)::

        fedavg      x + eta d
        fedavgm     m = b1 m + d;  x + eta m
        nesterov    m = b1 m + d;  x + eta (d + b1 m)
        fedadagrad  m = b1 m + (1 - b1) d;  v = v + d^2;  x + eta m / (sqrt(v) + tau)
        fedadam     v = b2 v + (1 - b2) d^2, the rest as in fedadagrad
        fedyogi     v = v - (1 - b2) d^2 sign(v - d^2), the rest as in fedadagrad

    ``moments`` lacks what no round has changed yet: m starts at 0, v at tau^2. ``change`` is used up: with
    ``fedavg`` the next state takes its memory, so that a large model is held twice and not three times.

    Raises:
        KeyError: the states differ in names.
    """
    rule = settings.server_optimizer
    rate = settings.server_learning_rate or DEFAULT_RATES.get(rule, 0.01)
    if rule == "fedavg":
        return combine(lambda x, d: d.mul_(rate).add_(x), current, change), {}
    first = zeros_like(current) | part(moments, FIRST)
    if rule in ("fedavgm", "nesterov"):
        first = combine(lambda m, d: settings.momentum * m + d, first, change)
        if rule == "nesterov":
            step = combine(lambda d, m: d + settings.momentum * m, change, first)
            return combine(lambda x, s: x + rate * s, current, step), named(first, FIRST)
        return combine(lambda x, m: x + rate * m, current, first), named(first, FIRST)

    tau = settings.adaptivity
    second = combine(lambda x: x.new_full(x.shape, tau**2), current) | part(moments, SECOND)
    first = combine(lambda m, d: settings.momentum * m + (1 - settings.momentum) * d, first, change)
    decay = settings.second_momentum
    if rule == "fedadagrad":
        second = combine(lambda v, d: v + d**2, second, change)
    elif rule == "fedadam":
        second = combine(lambda v, d: decay * v + (1 - decay) * d**2, second, change)
    else:
        second = combine(lambda v, d: v - (1 - decay) * d**2 * (v - d**2).sign(), second, change)
    following = combine(lambda x, m, v: x + rate * m / (v.sqrt() + tau), current, first, second)
    return following, {**named(first, FIRST), **named(second, SECOND)}
