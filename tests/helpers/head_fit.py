"""Rounds in which clients fit the head."""

from __future__ import annotations

from typing import Any

from fedcustom.data.examples import ClientData
from fedcustom.methods import (
    UNFINISHED,
    Aggregate,
    Answer,
    Client,
    State,
    Task,
    WeightTuning,
    Work,
)
from helpers.methods import classification_examples

ROUND: dict[str, Any] = {"fit_head_rounds": [1], "fit_head_least_texts": 1}
"""Training settings of a run whose first round fits the head, to all examples."""

GUARDED: dict[str, Any] = {"fit_head_rounds": [1]}
"""The same with what clients withhold by default."""

WIDTH, LABELS = 32, 3
"""What the tiny encoder's head is fitted on: numbers a vector, and labels."""


def asked(
    method: WeightTuning, state: State, clients: dict[str, Client], number: int = 1
) -> tuple[dict[str, Task], list[Answer]]:
    """The tasks of one exchange, and the clients' answers as the server takes them."""
    tasks = method.configure(state, number, {name: Work(epochs=1) for name in clients})
    answers = []
    for name in tasks:
        client = clients[name]
        update = method.execute(tasks[name], client)
        method.check(tasks[name], update)
        answers.append(Answer(name, tasks[name], update))
    return tasks, answers


def fitted(
    method: WeightTuning, clients: dict[str, Client], state: State | None = None, number: int = 1
) -> State:
    """The state after a whole round, with all its exchanges."""
    return aggregate_of(method, clients, state, number).state


def aggregate_of(
    method: WeightTuning, clients: dict[str, Client], state: State | None = None, number: int = 1
) -> Aggregate:
    """The state after a whole round, and what is reported of it."""
    state = state or method.initialise()
    merged = method.aggregate(state, iter(asked(method, state, clients, number)[1]))
    while UNFINISHED in merged.state.values:
        state = merged.state
        merged = method.aggregate(state, iter(asked(method, state, clients, number)[1]))
    return merged


def alone_with(count: int) -> Client:
    """A client with so many examples of label 0, and one of label 1."""
    pool = classification_examples(60)
    first, second = ([e for e in pool if e.label == label] for label in (0, 1))
    return Client("d", ClientData("d", [*first[:count], second[0]]))
