"""Hostile clients: they work like the others and then change what they send."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from ..core.errors import RecipeError
from ..core.tensors import Tensors
from ..methods.protocol import Task, Update
from ..methods.tuning.head_messages import HEAD_TASKS
from ..simulation.settings import AttackSettings


def hostile_clients(names: Sequence[str], settings: AttackSettings, seed: int) -> frozenset[str]:
    """Which clients are hostile: the fraction of all of them, but one at least, drawn by the seed."""
    if settings.kind == "none":
        return frozenset()
    generator = np.random.default_rng([seed, 8])
    chosen = generator.choice(len(names), size=max(1, round(settings.fraction * len(names))), replace=False)
    return frozenset(names[int(i)] for i in chosen)


def attack(update: Update, settings: AttackSettings, seed: Sequence[int]) -> Update:
    """A hostile client's update in place of its honest one."""
    generator = torch.Generator().manual_seed(int(np.random.default_rng(seed).integers(2**62)))

    def hostile(tensor: Tensor) -> Tensor:
        if settings.kind == "sign_flip":
            return torch.mul(tensor, -settings.scale)
        if settings.kind in ("label_flip", "backdoor"):  # the malice is in the data
            return torch.mul(tensor, settings.boost)
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor)
        length = settings.scale * tensor.norm() / max(1.0, tensor.numel() ** 0.5)
        return torch.mul(noise, length)

    return replace(update, tensors={name: hostile(tensor) for name, tensor in update.tensors.items()})


def conspiracy(settings: AttackSettings) -> Callable[[Mapping[str, Update], int], dict[str, Update]]:
    """A little is enough (Baruch et al. 2019, algorithm 3): from the hostile clients' honest updates of a
    round and the number of clients in it, what all of them send.

    With m hostile of n clients, and the mean and standard deviation of the hostile clients' own changes,
    number by number::

        s = floor(n / 2 + 1) - m;   z = max{z: Phi(z) < (n - m - s) / (n - m)};   sent = mean - z deviation

    at most so far from the mean that s honest clients are still farther. Where the formula gives less than
    0, z is 0. One hostile client alone knows no deviation, and sends its honest change.
    """

    def agree(updates: Mapping[str, Update], clients: int) -> dict[str, Update]:
        z = settings.deviations
        if z is None:
            z = unsuspicious_deviations(clients, len(updates))
        shapes = {tuple(sorted((k, t.shape) for k, t in u.tensors.items())) for u in updates.values()}
        if len(shapes) > 1:
            raise RecipeError("attack.kind = 'alie': needs a method whose clients all send the same shapes")
        tensors: Tensors = {}
        for name in next(iter(updates.values())).tensors:
            stack = torch.stack([update.tensors[name] for update in updates.values()])
            tensors[name] = stack.mean(dim=0) - z * stack.std(dim=0, correction=0)
        return {client: replace(update, tensors=tensors) for client, update in updates.items()}

    return agree


def unsuspicious_deviations(clients: int, hostile: int) -> float:
    """z of :func:`conspiracy`, 0 at least."""
    honest, supporters = clients - hostile, clients // 2 + 1 - hostile
    share = (honest - supporters) / honest if honest else 0.0
    return max(0.0, NormalDist().inv_cdf(share)) if 0 < share < 1 else 0.0


def falsifier(
    hostile: frozenset[str], settings: AttackSettings, seed: int
) -> Callable[[Task, str, Update], Update]:
    """What becomes of a client's honest update before it is sent: hostile ones falsify it."""

    def falsified(task: Task, client: str, update: Update) -> Update:
        if client not in hostile or settings.kind == "alie" or task.kind in HEAD_TASKS:
            return update  # sums of poisoned examples are malice enough
        number = int(task.values.get("round", 0))
        return attack(update, settings, [seed, 9, number, *client.encode()])

    return falsified
