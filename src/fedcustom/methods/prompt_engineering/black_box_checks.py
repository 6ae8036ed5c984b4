"""Checks of what a client's search for a soft prompt came to."""

from __future__ import annotations

import math
from typing import Any

import torch

from ...core.errors import UpdateError
from ..messages import Task, Update, typed
from .messages import SearchTask, SearchUpdate

WORST = 1e6
"""The loss of a soft prompt under which the model gives no finite number."""

MOST_GROWTH = 100.0
"""Of a step size, in one client's search."""

MOST_STEPS = 3.0
"""By which the mean moves in one generation, in steps of the length that is expected of one."""


def check_search_update(task: Task, update: Update, generations: int) -> None:
    """Refuse other shapes, numbers that are not finite, what is no covariance, and a distribution that no
    search of so many ``generations`` can have come to from the task's one.

    Raises:
        UpdateError: says what is wrong.
    """
    if update.tensors.keys() != task.tensors.keys():
        raise UpdateError(f"wrong tensor names: {', '.join(sorted(update.tensors)) or 'none'}")
    for name, sent in task.tensors.items():
        tensor = update.tensors[name]
        if tensor.shape != sent.shape or tensor.dtype != sent.dtype:
            raise UpdateError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, not {tuple(sent.shape)}")
        if not bool(torch.isfinite(tensor).all()) or float(tensor.abs().max()) > WORST:
            raise UpdateError(f"{name} holds numbers that are not finite or above {WORST:g}")
    covariance = update.tensors["covariance"].double()
    if covariance.dim() == 2:
        if not torch.allclose(covariance, covariance.T, atol=1e-5):
            raise UpdateError("covariance is not symmetric")
        covariance = torch.linalg.eigvalsh(covariance)
    if float(covariance.min()) <= 0:
        raise UpdateError("covariance is not positive definite")
    said = typed(update, SearchUpdate)
    sigma, loss, examples = said.sigma, said.loss, said.examples
    if not _is_finite(sigma) or not 0 < float(sigma) < WORST:
        raise UpdateError(f"sigma {sigma!r} is not a positive number")
    if not _is_finite(loss) or loss < 0:
        raise UpdateError(f"loss {loss!r} is not a finite number from 0")
    if type(examples) is not int or examples < 1 or update.weight != examples:
        raise UpdateError(f"examples {examples!r}, weight {update.weight!r}: must be one positive integer")
    _check_distance(typed(task, SearchTask), said, generations)


def _check_distance(task: SearchTask, update: SearchUpdate, generations: int) -> None:
    """Refuse a distribution too far away: it would carry the server's to where no client finds back from."""
    if update.sigma > MOST_GROWTH * task.sigma:
        most = MOST_GROWTH * task.sigma
        raise UpdateError(f"sigma {update.sigma:.3g}: at most {most:.3g} is allowed")
    moved = update.tensors["mean"].double() - task.tensors["mean"].double()
    # C has trace d, so that a step is about sigma sqrt(d) long.
    most = MOST_STEPS * generations * max(task.sigma, update.sigma) * math.sqrt(len(moved))
    if not (distance := float(torch.linalg.vector_norm(moved))) <= most:
        raise UpdateError(f"the mean moved by {distance:.3g}; at most {most:.3g} is allowed")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
