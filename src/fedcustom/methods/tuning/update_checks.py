"""Checks of states and of trained clients' updates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from ...core.errors import UpdateError
from ..messages import Work
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


def check_weight(weight: float) -> None:
    """Refuse a weight that is no positive number, or far too large for one.

    Raises:
        UpdateError: names it.
    """
    if not (isinstance(weight, int | float) and 0 < weight < 1e12):
        raise UpdateError(f"weight {weight!r} is not a positive number")


def check_figures(
    task: TrainTask,
    update: TrainUpdate,
    batch_size: int,
    *,
    hides_rows: bool = False,
    hides_loss: bool | None = None,
) -> None:
    """Refuse a weight, a loss, and numbers of steps and examples that training cannot have had. A client that
    hides its rows, or itself, tells no loss (``hides_loss``; unset: as its rows), and where it hides its rows
    its last batch of a task is as large as the others.

    Raises:
        UpdateError: names the figure, and what the task asked for.
    """
    check_weight(update.weight)
    loss, steps, examples = update.loss, update.steps, update.examples
    if hides_rows if hides_loss is None else hides_loss:
        if loss is not None:
            what = "rows are" if hides_rows else "client is"
            raise UpdateError(f"a training loss came with an update whose {what} hidden")
    elif not isinstance(loss, int | float) or not math.isfinite(loss):
        raise UpdateError(f"training loss {loss!r} is not a finite number")
    bounds = work_bounds(task.work, math.ceil(update.weight), batch_size)
    if type(steps) is not int or not bounds.least_steps <= steps <= bounds.most_steps:
        raise UpdateError(
            f"steps {steps!r}: must be an integer from {bounds.least_steps} to {bounds.most_steps}"
        )
    most = steps * batch_size if hides_rows else bounds.examples
    if type(examples) is not int or not 1 <= examples <= most:
        raise UpdateError(f"examples {examples!r}: must be an integer from 1 to {most}")


class WorkBounds(NamedTuple):
    """How many optimiser steps a task takes at least and at most, and examples at most."""

    least_steps: int
    most_steps: int
    examples: int


def work_bounds(work: Work, count: int, batch_size: int) -> WorkBounds:
    """The bounds of a client that has ``count`` training examples. Where its passes begin is not known, so
    that each may end with one batch more.
    """
    largest = batch_size
    if work.steps is not None:
        return WorkBounds(work.steps, work.steps, work.steps * batch_size)
    seen = work.examples
    if seen is None:
        seen = max(1, round((1 if work.epochs is None else work.epochs) * count))
    if work.batches is not None:
        largest = math.ceil(count / min(count, work.batches))
    smallest = largest if work.batches is None else max(1, count // min(count, work.batches))
    passes = seen // count + 1
    return WorkBounds(math.ceil(seen / largest), min(seen, math.ceil(seen / smallest) + passes), seen)
