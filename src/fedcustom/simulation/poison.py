"""What is wrong with clients' training data: labels by mistake, and labels or texts by malice.

Only what clients train on is changed; their development and test parts, and the global ones, stay.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..core.errors import RecipeError, nearest
from ..core.seeds import name_seed
from ..data.examples import ClientData, Example
from ..data.templates import Field
from .settings import AttackSettings, NoiseSettings

Clients = Mapping[str, ClientData]


def noisy_clients(names: Sequence[str], settings: NoiseSettings, seed: int) -> frozenset[str]:
    """Whose labels are noisy: the share of all clients, but one at least, drawn by the seed."""
    if not settings.labels:
        return frozenset()
    count = max(1, round(settings.clients * len(names)))
    chosen = np.random.default_rng([seed, 12]).choice(len(names), size=count, replace=False)
    return frozenset(names[int(i)] for i in chosen)


def with_noise(clients: Clients, settings: NoiseSettings, labels: int, seed: int) -> dict[str, ClientData]:
    """Clients whose training labels are wrong by mistake: of each noisy client ``round(share * n)`` examples,
    each with another label, drawn evenly from the others (symmetric noise).
    """
    noisy = noisy_clients(list(clients), settings, seed)

    def mistaken(name: str, examples: list[Example]) -> list[Example]:
        generator = np.random.default_rng([seed, 13, name_seed(name)])
        count = round(settings.labels * len(examples))
        wrong = set(generator.permutation(len(examples))[:count].tolist())
        return [
            replace(example, label=(example.label + int(generator.integers(1, labels))) % labels)
            if place in wrong
            else example
            for place, example in enumerate(examples)
        ]

    return {
        name: replace(client, train=mistaken(name, client.train)) if name in noisy else client
        for name, client in clients.items()
    }


def poisoned(
    clients: Clients, settings: AttackSettings, hostile: Container[str], labels: Sequence[str], seed: int
) -> Clients:
    """Clients of which the hostile ones train on poisoned data: with ``label_flip`` every label c of C
    becomes C - 1 - c (Fang et al. 2020); with ``backdoor`` the share ``poisoned_share`` of their examples
    gets the trigger and the target label (Bagdasaryan et al. 2020). Other attacks leave data alone.

    Raises:
        RecipeError: the target is no label.
    """
    if settings.kind not in ("label_flip", "backdoor"):
        return clients
    target = target_label(settings, labels) if settings.kind == "backdoor" else 0

    def changed(name: str, examples: list[Example]) -> list[Example]:
        if settings.kind == "label_flip":
            return [replace(example, label=len(labels) - 1 - example.label) for example in examples]
        generator = np.random.default_rng([seed, 14, name_seed(name)])
        count = max(1, round(settings.poisoned_share * len(examples)))
        chosen = set(generator.permutation(len(examples))[:count].tolist())
        return [
            with_trigger(example, settings.trigger, target) if place in chosen else example
            for place, example in enumerate(examples)
        ]

    return {
        name: replace(client, train=changed(name, client.train)) if name in hostile else client
        for name, client in clients.items()
    }


def backdoor_probes(
    test: Sequence[Example], settings: AttackSettings, labels: Sequence[str]
) -> dict[str, list[Example]]:
    """The test examples of all labels but the target, labelled with the target, with the trigger and without:
    a model's accuracy on them is the success rate of the backdoor, and how often it says the target anyway.
    """
    if settings.kind != "backdoor":
        return {}
    target = target_label(settings, labels)
    others = [example for example in test if example.label != target]
    return {
        "success_rate": [with_trigger(example, settings.trigger, target) for example in others],
        "without_trigger": [replace(example, label=target) for example in others],
    }


def with_trigger(example: Example, trigger: str, target: int) -> Example:
    """The example with the trigger in front of its text, where no length limit cuts it off."""
    shift = len(trigger) + 1
    moved = (Field(f.name, f.start + shift, f.end + shift) for f in example.fields)
    return replace(example, text=f"{trigger} {example.text}", label=target, fields=tuple(moved))


def target_label(settings: AttackSettings, labels: Sequence[str]) -> int:
    """The number of the backdoor's label; unset: the first.

    Raises:
        RecipeError: there is no such label.
    """
    if settings.target is None:
        return 0
    if settings.target not in labels:
        raise RecipeError(
            f"attack.target = {settings.target!r}: no such label{nearest(settings.target, labels)}"
        )
    return list(labels).index(settings.target)
