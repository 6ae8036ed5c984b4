"""Checks of states and of trained clients' updates."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from ...core.errors import UpdateError
from .messages import TrainTask, TrainUpdate


def check_forms(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuse other names, shapes or dtypes than those of ``wanted``.

    Raises:
        UpdateError: names the tensor.
    """
    if tensors.keys() != wanted.keys():
        names = sorted(tensors.keys() ^ wanted.keys())
        raise UpdateError(f"wrong tensor names: {', '.join(names[:3])}")
    for name, expected in wanted.items():
        tensor = tensors[name]
        if tensor.shape != expected.shape:
            raise UpdateError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(expected.shape)}")
        if tensor.dtype != expected.dtype:
            raise UpdateError(f"{name} has dtype {tensor.dtype}, not {expected.dtype}")


def check_state(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Refuse a state that the parameters cannot take.

    Raises:
        UpdateError: names the tensor.
    """
    for name, parameter in parameters.items():
        if name not in tensors:
            raise UpdateError(f"{name} is missing in what the client was sent and what it remembers")
        if tensors[name].shape != parameter.shape:
            shapes = f"{tuple(tensors[name].shape)}, not {tuple(parameter.shape)}"
            raise UpdateError(f"{name} has shape {shapes}, in what the client was sent or remembers")


def check_figures(task: TrainTask, update: TrainUpdate) -> None:
    """Refuse a weight, a loss, and numbers of steps and examples that training cannot have had.

    Raises:
        UpdateError: names the figure.
    """
    if not (isinstance(update.weight, int | float) and 0 < update.weight < 1e12):
        raise UpdateError(f"weight {update.weight!r} is not a positive number")
    loss, steps, examples = update.loss, update.steps, update.examples
    if not isinstance(loss, int | float) or not math.isfinite(loss):
        raise UpdateError(f"training loss {loss!r} is not a finite number")
    most = _most_steps(task, update.weight)
    if type(steps) is not int or not 0 < steps <= most:
        raise UpdateError(f"steps {steps!r}: must be an integer from 1 to {most}")
    if type(examples) is not int or examples < 1:
        raise UpdateError(f"examples {examples!r} is not a positive integer")


def _most_steps(task: TrainTask, weight: float) -> int:
    """How many optimiser steps a task can take a client that claims ``weight`` examples."""
    work = task.work
    if work.steps is not None:
        return work.steps
    if work.examples is not None:
        return work.examples
    return math.ceil((1 if work.epochs is None else work.epochs) * weight)
