"""The timeline of a run's clients: which of them answered in which round, late, or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from markupsafe import Markup

from . import formatting as words
from .axes import Axis, Tick, whole
from .groups import Group
from .read import Round
from .svg import Chart, Mark
from .traffic import MOST_CLIENTS

State = Literal["answered", "late", "absent"]

SYMBOLS: Mapping[State, str] = {"answered": "square", "late": "diamond", "absent": "x"}
"""What tells states apart beside their colours."""
MOST_SYMBOLS = 30
"""Rounds up to which each has its symbol; of more, spans of rounds are bars."""
ROW = 26
LONGEST_NAME = 16


@dataclass(frozen=True, slots=True)
class Timeline:
    """The timeline of one run."""

    run: str
    chart: Markup


def state_of(line: Round, client: str) -> State | None:
    """What became of a client in a round; None where it was not asked."""
    if client in line.left_out:
        return "absent"
    if line.late.get(client):
        return "late"
    return "answered" if client in line.cohort else None


def timelines(groups: Sequence[Group]) -> list[Timeline]:
    """The timelines of runs with few clients that were deployed, or in which some client was late or
    absent.
    """
    found = []
    for group in groups:
        for run in group.runs:
            missed = any(line.left_out or any(line.late.values()) for line in run.history)
            if group.baseline == "federated" and (run.deployed or missed):
                chart = timeline(run.history)
                title = f"{words.capitalised(group.label)}, seed {run.summary.seed}"
                found += [Timeline(title, chart)] if chart is not None else []
    return found


def timeline(history: Sequence[Round]) -> Markup | None:
    """Rounds along x, a row a client; None without clients, or with more than can be shown."""
    clients = sorted({client for line in history for client in line.cohort})
    if not 1 <= len(clients) <= MOST_CLIENTS:
        return None
    rounds = max(line.round for line in history)
    x = whole(rounds + 1)
    x = Axis(0.5, rounds + 0.5, tuple(_ticks(x, rounds)))
    names = (Tick(1 - (row + 0.5) / len(clients), _short(name)) for row, name in enumerate(clients))
    chart = Chart(
        x,
        Axis(0, len(clients), tuple(names)),
        "Round",
        height=ROW * len(clients) + 8,
        gutter="names",
        grid="y",
    )
    shown: set[State] = set()
    for row, client in enumerate(clients):
        y = 1 - (row + 0.5) / len(clients)
        marks: dict[State, list[Mark]] = {}
        for first, last, state, reason in _spans(history, client, single=rounds <= MOST_SYMBOLS):
            shown.add(state)
            tip = f"round{'s' * (first < last)} {words.rounds(range(first, last + 1))}: {state}{reason}"
            if rounds <= MOST_SYMBOLS:
                marks.setdefault(state, []).append(Mark(x.place(first), y, tip))
            else:
                ends, half = (x.place(first - 0.5), x.place(last + 0.5)), _half(state) / len(clients)
                chart.box(*ends, y - half, y + half, f"state-{state}", "span", tip)
        for state, each in marks.items():
            chart.marks(each, f"state-{state}", SYMBOLS[state], client)
    for state, symbol in SYMBOLS.items():
        if state in shown:
            chart.entry(state, f"state-{state}", "", symbol)
    return chart.html()


def _half(state: State) -> float:
    """Half the height of a bar in its row: states differ in it, not in their colours alone."""
    return {"answered": 0.36, "late": 0.22, "absent": 0.1}[state]


def _spans(history: Sequence[Round], client: str, *, single: bool) -> Iterator[tuple[int, int, State, str]]:
    """A client's states with their first and last round and the reason of an absence; each round by itself
    where ``single``.
    """

    def key(line: Round) -> tuple[object, ...]:
        at = (line.round,) if single else ()
        return (state_of(line, client), line.late.get(client, 0), line.left_out.get(client, ""), *at)

    for (state, behind, reason, *_), lines in groupby(history, key):
        numbers = [line.round for line in lines]
        if state is not None:
            why = f" by {words.plural(int(str(behind)), 'round')}" if state == "late" else ""
            why = f" ({reason})" if reason else why
            yield numbers[0], numbers[-1], state, why  # type: ignore[misc]


def _ticks(axis: Axis, rounds: int) -> Iterator[Tick]:
    """The axis' round numbers from 1 on, in the middle of their rounds."""
    for tick in axis.ticks:
        if 1 <= int(tick.text) <= rounds:
            yield Tick((int(tick.text) - 0.5) / rounds, tick.text)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 1] + "…"
