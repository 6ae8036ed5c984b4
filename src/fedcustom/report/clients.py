"""What a report says of single clients: their scores, and in which rounds they were left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from . import formatting as words
from .groups import Group, client_scores, lower_is_better

MOST_CLIENTS = 200
"""Clients that a table of all of them lists; of more, the worst."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A client that was left out of some rounds of a run, and why."""

    run: str
    client: str
    reason: str
    rounds: str


@dataclass(frozen=True, slots=True)
class ClientTable:
    """Each client's score by group, for one metric."""

    metric: str
    headings: list[str]
    rows: list[tuple[str, list[str]]]
    left_out: int


def clients_left_out(groups: Sequence[Group]) -> list[LeftOut]:
    """Each client and reason once a run, with all rounds of it."""
    found = []
    for group in groups:
        for run in group.runs:
            rounds: dict[tuple[str, str], list[int]] = {}
            for line in run.history:
                for client, reason in line.left_out.items():
                    rounds.setdefault((client, reason), []).append(line.round)
            found += [
                LeftOut(words.run_title(group, run), client, words.shortened(reason), words.rounds(numbers))
                for (client, reason), numbers in rounds.items()
            ]
    return found


def client_tables(groups: Sequence[Group], metrics: Sequence[str]) -> list[ClientTable]:
    """A table of each metric that clients have a score of."""
    tables = []
    for metric in metrics:
        columns = {group.label: client_scores(group, metric).set_index("client")["score"] for group in groups}
        columns = {label: scores for label, scores in columns.items() if not scores.empty}
        every = dict.fromkeys(str(client) for scores in columns.values() for client in scores.index)
        clients = _worst(list(every), list(columns.values()), metric)
        rows = [
            (
                client,
                [words.score(float(scores.get(client, float("nan"))), metric) for scores in columns.values()],
            )
            for client in clients
        ]
        if rows:
            headings = [words.capitalised(label) for label in columns]
            tables.append(ClientTable(metric, headings, rows, len(every) - len(rows)))
    return tables


def _worst(clients: list[str], columns: Sequence[pd.Series], metric: str) -> list[str]:
    """The clients that a table shows: all in their order or, of many, those that are worst on average."""
    if len(clients) <= MOST_CLIENTS:
        return clients
    means = pd.concat(columns, axis=1).mean(axis=1)
    return [str(client) for client in means.sort_values(ascending=not lower_is_better(metric)).index][
        :MOST_CLIENTS
    ]
