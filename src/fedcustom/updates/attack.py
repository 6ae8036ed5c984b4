"""Simulated attacks on updates: sign flips, noise, boosting, and "a little is enough" (ALIE)."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from ..core.errors import RecipeError
from ..core.tensors import Tensors
from ..methods.messages import Update
from ..simulation.settings import AttackSettings
from .transform import ClientContext, UpdateTransform


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


class Falsification(UpdateTransform):
    """What hostile clients do to their own updates (:func:`attack`), each by itself."""

    def __init__(self, hostile: frozenset[str], settings: AttackSettings, seed: int) -> None:
        self.hostile, self.settings, self.seed = hostile, settings, seed
        self.name = f"attack.kind = {settings.kind!r}"
        self.is_linear = settings.kind != "random"

    def on_client(self, update: Update, context: ClientContext) -> Update:
        """A hostile client's falsified update; another's, and exact answers, as they are: sums of poisoned
        examples are malice enough.
        """
        if context.client not in self.hostile or context.task.exact_answer:
            return update
        seed = [self.seed, 9, context.round_number, *context.client.encode()]
        return attack(update, self.settings, seed)


class LittleIsEnough(UpdateTransform):
    """A little is enough (Baruch et al. 2019, algorithm 3): from the hostile clients' honest updates of a
    round and the number of clients in it, what all of them send.

    With m hostile of n clients, and the mean and standard deviation of the hostile clients' own changes,
    number by number::

        s = floor(n / 2 + 1) - m;   z = max{z: Phi(z) < (n - m - s) / (n - m)};   sent = mean - z deviation

    at most so far from the mean that s honest clients are still farther. Where the formula gives less than
    0, z is 0. One hostile client alone knows no deviation, and sends its honest change.
    """

    name = "attack.kind = 'alie'"
    needs_individual_updates = True

    def __init__(self, hostile: frozenset[str], settings: AttackSettings) -> None:
        self.members: Container[str] = hostile
        self.settings = settings

    def on_clients(self, updates: Mapping[str, Update], cohort: int) -> dict[str, Update]:
        """The same changes for all hostile clients, each with its own weight and figures.

        Raises:
            RecipeError: their changes differ in names or shapes.
        """
        z = self.settings.deviations
        if z is None:
            z = unsuspicious_deviations(cohort, len(updates))
        shapes = {tuple(sorted((k, t.shape) for k, t in u.tensors.items())) for u in updates.values()}
        if len(shapes) > 1:
            raise RecipeError("attack.kind = 'alie': needs a method whose clients all send the same shapes")
        tensors: Tensors = {}
        for name in next(iter(updates.values())).tensors:
            stack = torch.stack([update.tensors[name] for update in updates.values()])
            tensors[name] = stack.mean(dim=0) - z * stack.std(dim=0, correction=0)
        return {client: replace(update, tensors=tensors) for client, update in updates.items()}


def unsuspicious_deviations(clients: int, hostile: int) -> float:
    """z of :class:`LittleIsEnough`, 0 at least."""
    honest, supporters = clients - hostile, clients // 2 + 1 - hostile
    share = (honest - supporters) / honest if honest else 0.0
    return max(0.0, NormalDist().inv_cdf(share)) if 0 < share < 1 else 0.0


def simulated_attack(
    hostile: frozenset[str], settings: AttackSettings, seed: int
) -> tuple[UpdateTransform, ...]:
    """What the recipe's attack does to the updates of these clients; nothing where it names none."""
    if settings.kind == "none":
        return ()
    if settings.kind == "alie":
        return (LittleIsEnough(hostile, settings),)
    return (Falsification(hostile, settings, seed),)
