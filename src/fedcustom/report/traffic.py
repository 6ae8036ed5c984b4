"""Traffic table: each client's answers, absences and bytes, where clients are few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from . import formatting as words
from .groups import Group
from .read import Run

MOST_CLIENTS = 32
"""Clients up to which each has a line of its own."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """One client's part in one run: rounds asked and missed, and bytes as a reader sees them."""

    run: str
    client: str
    asked: int
    missed: int
    up: str
    down: str


def traffic(groups: Sequence[Group]) -> list[Traffic]:
    """A line for each client of each federated run with few clients."""
    return [
        line
        for group in groups
        if group.baseline == "federated"
        for run in group.runs
        for line in traffic_of(f"{words.capitalised(group.label)}, seed {run.summary.seed}", run)
    ]


def traffic_of(title: str, run: Run) -> list[Traffic]:
    """A line for each client of a run with few of them; none where they are many."""
    clients = sorted({client for line in run.history for client in line.cohort})
    if len(clients) > MOST_CLIENTS:
        return []
    return [
        Traffic(
            title,
            client,
            sum(client in line.cohort for line in run.history),
            sum(client in line.left_out for line in run.history),
            words.byte_count(sum(line.bytes_up.get(client, 0) for line in run.history)),
            words.byte_count(sum(line.bytes_down.get(client, 0) for line in run.history)),
        )
        for client in clients
    ]
