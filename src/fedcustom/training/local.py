"""Local training: one client's optimisation of named parameters by backpropagation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import UpdateError
from ..core.tensors import Tensors
from ..data.tokens import Batch
from .muon import Muon
from .settings import TrainingSettings


@dataclass(frozen=True)
class LocalResult:
    """What came of local training: the mean loss over examples, how many examples and steps, and optimiser
    moments. Where rows are hidden there is no loss, and the examples are those on average.
    """

    loss: float | None
    examples: int
    steps: int
    moments: Tensors


def schedule_factor(settings: TrainingSettings, round_number: int, rounds: int) -> float:
    """What the learning rates are multiplied by in a round (1 to ``rounds``): warm-up, then the schedule
    towards zero.
    """
    if round_number <= settings.warmup_rounds:
        return round_number / (settings.warmup_rounds + 1)
    share = (round_number - 1 - settings.warmup_rounds) / max(1, rounds - settings.warmup_rounds)
    if settings.schedule == "linear":
        return 1 - share
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * share))
    return 1.0


def learning_rate(settings: TrainingSettings, *, head: bool) -> float:
    """The learning rate of the method's tensors or of the head, before the schedule.

    Raises:
        ValueError: none is set.
    """
    if settings.learning_rate is None or settings.learning_rate == "auto":
        raise ValueError("training.learning_rate is open: fill in the method's default before training")
    return (settings.head_learning_rate if head else None) or settings.learning_rate


def make_optimizer(
    parameters: Mapping[str, nn.Parameter],
    settings: TrainingSettings,
    factor: float,
    head: frozenset[str],
    matrices: Mapping[str, int],
) -> torch.optim.Optimizer:
    """The client's optimiser; the head has a learning rate of its own where the recipe gives one.
    ``matrices`` says which tensors are matrices to Muon, and how many lie side by side in each.
    """
    rate = factor * learning_rate(settings, head=False)
    head_rate = factor * learning_rate(settings, head=True)
    ours = matrices if settings.optimizer == "muon" else {}
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in parameters.items() if n not in head and n not in ours], "lr": rate},
        {"params": [p for n, p in parameters.items() if n in head], "lr": head_rate},
    ]
    groups = [group for group in groups if group["params"]]
    if muon := [{"params": [parameters[n]], "lr": rate, "parts": ours[n]} for n in parameters if n in ours]:
        return Muon(muon, groups, settings.weight_decay)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=rate, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
    return torch.optim.AdamW(groups, lr=rate, weight_decay=settings.weight_decay, fused=True)


def train_locally(
    parameters: Mapping[str, nn.Parameter],
    steps: Iterable[Iterable[tuple[Batch, float]]],
    loss_of: Callable[[Batch], Tensor],
    settings: TrainingSettings,
    factor: float,
    *,
    head: frozenset[str] = frozenset(),
    matrices: Mapping[str, int] | None = None,
    moments: Mapping[str, Tensor] | None = None,
    shift: Mapping[str, Tensor] | None = None,
) -> LocalResult:
    """Train ``parameters`` in place.

    ``steps`` has the batches of each optimiser step, with their weights in its loss, which sum to 1: one
    batch, or several that are small enough for the memory. ``loss_of`` gives a batch's mean loss, ``factor``
    is the schedule's. With ``settings.proximal`` the values
    at the start are the anchor of FedProx (Li et al. 2020, eq. 2); its gradient mu * (w - w_start) is added
    to the loss's. ``shift`` is added to every gradient as well. ``moments`` are those of an earlier call, for
    a client that keeps its optimiser.

    Raises:
        UpdateError: the loss is not finite, or there was no batch.
    """
    optimizer = make_optimizer(parameters, settings, factor, head, matrices or {})
    if moments:
        restore_moments(optimizer, parameters, moments)
    anchors = {name: p.detach().clone() for name, p in parameters.items()} if settings.proximal else {}
    total, examples, done = 0.0, 0, 0
    for batches in steps:
        value, size = 0.0, 0
        for batch, weight in batches:
            loss = weight * loss_of(batch)
            value, size = value + loss.item(), size + len(batch["labels"])
            if not math.isfinite(value):
                raise UpdateError(
                    f"the training loss is not finite after {done} steps; lower training.learning_rate"
                )
            loss.backward()  # type: ignore[no-untyped-call]
        for name, anchor in anchors.items():
            gradient = parameters[name].grad
            if gradient is not None:
                gradient.add_(parameters[name].detach() - anchor, alpha=settings.proximal)
        for name, constant in (shift or {}).items():
            if name in parameters and (gradient := parameters[name].grad) is not None:
                gradient.add_(constant.to(gradient.device))
        if settings.clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters.values(), settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total, examples, done = total + value * size, examples + size, done + 1
    if not done:
        raise UpdateError("there was nothing to train on")
    return LocalResult(total / examples, examples, done, named_moments(optimizer, parameters))


def named_moments(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> Tensors:
    """The optimiser's state as named tensors: ``<kind>/<parameter>``."""
    moments: Tensors = {}
    for name, parameter in parameters.items():
        for kind, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                moments[f"{kind}/{name}"] = value.detach()
    return moments


def restore_moments(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], moments: Mapping[str, Tensor]
) -> None:
    """Put back what :func:`named_moments` gave."""
    for key, value in moments.items():
        kind, name = key.split("/", maxsplit=1)
        device = "cpu" if kind == "step" else parameters[name].device
        optimizer.state[parameters[name]][kind] = value.to(device, copy=True)
