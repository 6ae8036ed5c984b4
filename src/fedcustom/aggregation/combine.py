"""Aggregation of a cohort's deltas by the rule that the recipe names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core import plugins
from ..core.errors import PluginError
from ..core.tensors import Tensors, is_finite
from . import robust
from .mean import weighted_mean
from .settings import OFFERED_RULES, AggregationSettings


@dataclass(frozen=True)
class Change:
    """What one client adds to the state that it was sent.

    ``weight`` is its weight in a mean, ``steps`` how many optimiser steps it took, ``discount`` what a late
    change is multiplied by (1 for one that is on time).
    """

    client: str
    tensors: Mapping[str, Tensor]
    weight: float = 1.0
    steps: int = 1
    discount: float = 1.0


AggregationRule = Callable[[Sequence[Change], AggregationSettings], Mapping[str, Tensor]]
"""What another package offers under ``fedcustom.aggregation``, as ``my_rule = "my_package:rule"``: a pure
function from a cohort's changes to one change of the same names and shapes. Late changes come multiplied by
their discount; ``weight`` is what ``aggregation.weighting`` makes of it.
"""

InnerProducts = Callable[[Sequence[Mapping[str, Tensor]]], Tensor]


def combine(
    changes: Iterable[Change],
    settings: AggregationSettings,
    *,
    root: Mapping[str, Tensor] | None = None,
    inner_products: InnerProducts = robust.inner_products,
) -> Tensors:
    """One change for the whole cohort.

    ``mean`` and ``fednova`` take the changes one by one, so that memory does not grow with the cohort; the
    other rules need all of them at once. ``root`` is the server's own change (``fltrust``),
    ``inner_products`` measures changes for the rules that look at distances.

    Raises:
        ValueError: there is no change, or too few for the rule.
        KeyError: changes differ in names.
        PluginError: another package's rule cannot be loaded, fails, or gives no such change.
    """
    if settings.rule == "mean":
        return weighted_mean(_one_by_one(changes, settings))
    if settings.rule == "fednova":
        return normalised_mean(
            (_discounted(change), _weight(change, settings), change.steps) for change in changes
        )
    if (rule := offered_rule(settings)) is not None:
        return _by_plugin(rule, changes, settings)
    tensors = [_discounted(change) for change in changes]
    if not tensors:
        raise ValueError("there is no change to combine")
    hostile = robust.byzantine_count(len(tensors), settings.byzantine_fraction)
    if settings.rule == "median":
        return robust.coordinate_median(tensors)
    if settings.rule == "trimmed_mean":
        return robust.trimmed_mean(tensors, min(hostile, (len(tensors) - 1) // 2))
    if settings.rule == "fltrust":
        if root is None:
            raise ValueError("fltrust needs a change of the server's own")
        tensors = [root, *tensors]
    gram = inner_products(tensors)
    if settings.rule == "krum":
        coefficients = robust.krum(gram, hostile)
    elif settings.rule == "multi_krum":
        coefficients = robust.krum(gram, hostile, chosen=max(1, len(tensors) - hostile))
    elif settings.rule == "geometric_median":
        coefficients = robust.geometric_median(gram)
    elif settings.rule == "norm_bounding":
        coefficients = robust.norm_bounding(gram, settings.bound)
    elif settings.rule == "centred_clipping":
        coefficients = robust.centred_clipping(gram, settings.bound)
    else:
        coefficients = robust.fltrust(gram)
    return linear_combination(tensors, coefficients.tolist())


def offered_rule(settings: AggregationSettings) -> AggregationRule | None:
    """The rule of another package that a recipe names; None where the rule is this package's.

    Raises:
        PluginError: it cannot be loaded; the message names the package.
    """
    if settings.rule not in OFFERED_RULES:
        return None
    rule: AggregationRule = plugins.load(OFFERED_RULES[settings.rule])
    return rule


def _by_plugin(rule: AggregationRule, changes: Iterable[Change], settings: AggregationSettings) -> Tensors:
    title = plugins.title(OFFERED_RULES[settings.rule])
    ready = [
        replace(change, tensors=_discounted(change), weight=_weight(change, settings), discount=1.0)
        for change in changes
    ]
    if not ready:
        raise ValueError("there is no change to combine")
    try:
        result = dict(rule(ready, settings))
    except Exception as error:  # whatever the other package's code raises
        raise PluginError(f"{title} failed: {type(error).__name__}: {error}") from error
    wanted = {name: tuple(tensor.shape) for name, tensor in ready[0].tensors.items()}
    if {name: tuple(getattr(tensor, "shape", ())) for name, tensor in result.items()} != wanted:
        raise PluginError(f"{title}: its change must have the names and shapes of the clients' changes")
    result = {name: tensor.to(ready[0].tensors[name].dtype) for name, tensor in result.items()}
    if not is_finite(result):
        raise PluginError(f"{title}: its change holds numbers that are not finite")
    return result


def normalised_mean(changes: Iterable[tuple[Mapping[str, Tensor], float, int]]) -> Tensors:
    """FedNova (Wang et al. 2020, equation 8) for changes with weights and numbers of local steps tau::

        (sum_k w_k tau_k) (sum_k w_k change_k / tau_k),   sum_k w_k = 1

    so that a client that takes more steps does not pull harder. Equal steps give the weighted mean. Consumes
    the changes one by one.

    Raises:
        ValueError: there is no change, or weights or steps are not positive.
    """
    weight_sum = step_sum = 0.0

    def normalised() -> Iterable[tuple[Mapping[str, Tensor], float]]:
        nonlocal weight_sum, step_sum
        for tensors, weight, steps in changes:
            if steps < 1:
                raise ValueError(f"steps must be positive, not {steps}")
            weight_sum, step_sum = weight_sum + weight, step_sum + weight * steps
            yield {name: tensor / steps for name, tensor in tensors.items()}, weight

    mean = weighted_mean(normalised())
    return {name: tensor * (step_sum / weight_sum) for name, tensor in mean.items()}


def linear_combination(changes: Sequence[Mapping[str, Tensor]], coefficients: Sequence[float]) -> Tensors:
    """``sum_k coefficient_k change_k``, name by name."""
    result = {name: torch.zeros_like(tensor) for name, tensor in changes[0].items()}
    for change, coefficient in zip(changes, coefficients, strict=True):
        if coefficient:
            for name, total in result.items():
                total.add_(change[name], alpha=coefficient)
    return result


def _one_by_one(
    changes: Iterable[Change], settings: AggregationSettings
) -> Iterator[tuple[Mapping[str, Tensor], float]]:
    for change in changes:
        yield _discounted(change), _weight(change, settings)
        del change  # before the next one is made


def _weight(change: Change, settings: AggregationSettings) -> float:
    return change.weight if settings.weighting == "examples" else 1.0


def _discounted(change: Change) -> Mapping[str, Tensor]:
    if change.discount == 1.0:
        return change.tensors
    return {name: tensor * change.discount for name, tensor in change.tensors.items()}
