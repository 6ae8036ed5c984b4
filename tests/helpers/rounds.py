"""Whole rounds through the verbs of a method, and how far two updates are apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fedcustom.data.examples import ClientData
from fedcustom.methods import UNFINISHED, Answer, Client, State, Update, WeightTuning, Work
from fedcustom.methods.tuning.messages import TrainUpdate
from helpers.methods import examples_for

SIZES = (5, 1, 8, 3)
"""Examples of each client in :func:`rounds`."""


def two_rounds(method: WeightTuning, kind: str) -> tuple[Any, set[str]]:
    """The state after two rounds of two clients, and the names of what came up."""
    examples = examples_for(kind)
    parts = {"a": examples[:4], "b": examples[4:10]}
    clients = {name: Client(name, ClientData(name, part)) for name, part in parts.items()}
    state, came = method.initialise(), set()
    for number in (1, 2):
        answers = []
        for name, client in clients.items():
            task = method.configure(state, number, {name: Work(epochs=1)})[name]
            update = method.execute(task, client)
            method.check(task, update)
            came |= update.tensors.keys()
            answers.append(Answer(name, task, update))
        state = finished(method, method.aggregate(state, answers).state, number, clients)
    return state, came


def finished(method: WeightTuning, state: State, number: int, clients: Mapping[str, Client]) -> State:
    """The state after the further exchanges of a round, if it has any."""
    while UNFINISHED in state.values:
        tasks = method.configure(state, number, {name: Work() for name in clients})
        answers = []
        for name, task in tasks.items():
            update = method.execute(task, clients[name])
            method.check(task, update)
            answers.append(Answer(name, task, update))
        state = method.aggregate(state, answers).state
    return state


def rounds(
    method: WeightTuning, kind: str, *, together: bool, double: bool = False
) -> list[dict[str, TrainUpdate]]:
    """The updates of two rounds of four unequal clients, two epochs in batches of three each.

    In ``double`` precision no rounding stands between two orders of the same sums, on any processor.
    """
    if double:
        method.base.model.double()
    examples = examples_for(kind)
    clients, start = {}, 0
    for number, size in enumerate(SIZES):
        part = [examples[(start + i) % len(examples)] for i in range(size)]
        clients[f"c{number}"] = Client(f"c{number}", ClientData(f"c{number}", part))
        start += size
    state, result = method.initialise(), []
    for number in (1, 2):
        tasks = method.configure(state, number, {name: Work(epochs=2) for name in clients})
        pairs = [(tasks[name], client) for name, client in clients.items()]
        answers = method.execute_together(pairs) if together else [method.execute(*pair) for pair in pairs]
        updates = {}
        for name, answer in zip(clients, answers, strict=True):
            assert isinstance(answer, TrainUpdate), answer
            method.check(tasks[name], answer)
            updates[name] = answer
        state = method.aggregate(
            state, [Answer(name, tasks[name], update) for name, update in updates.items()]
        ).state
        state = finished(method, state, number, clients)
        result.append(updates)
    return result


def distance(one: Update, other: Update) -> float:
    """How far two updates are from each other, relative to their size unless they are zero."""
    assert one.tensors.keys() == other.tensors.keys()
    gaps = torch.cat([(one.tensors[n] - other.tensors[n]).double().flatten() for n in one.tensors])
    size = torch.cat([one.tensors[n].double().flatten() for n in one.tensors])
    return float(gaps.norm() / (size.norm() if size.any() else 1))
