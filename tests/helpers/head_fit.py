"""Rounds in which clients fit the head."""

from __future__ import annotations

from typing import Any

from fedcustom.methods import Answer, Client, State, Task, WeightTuning, Work

ROUND: dict[str, Any] = {"fit_head_rounds": [1]}
"""Training settings of a run whose first round fits the head."""

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
