"""What runs promise of privacy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from . import formatting as words
from .groups import Group

SPENT_SHOWN = 8
"""Rounds of which it is told what was spent of epsilon, about."""


@dataclass(frozen=True, slots=True)
class Private:
    """What a run promises of privacy, and what its rounds have spent: some of them, the last one too."""

    run: str
    unit: str
    epsilon: str
    delta: str
    note: str
    spent: str


def promises(groups: Sequence[Group]) -> list[Private]:
    """Of each run that makes one."""
    found = []
    for group in groups:
        for run in group.runs:
            if (promise := run.summary.privacy) is None:
                continue
            rows = [line for line in run.history if line.epsilon is not None]
            chosen = rows[:: max(1, len(rows) // SPENT_SHOWN)]
            chosen += rows[-1:] if rows and rows[-1] not in chosen else []
            spent = ", ".join(f"{line.epsilon:.2f} (round {line.round})" for line in chosen)
            note = "" if promise.valid else "The noise can be repeated from the seed: nothing is promised."
            epsilon, delta = f"{promise.epsilon:.4g}", f"{promise.delta:g}"
            found.append(Private(words.run_title(group, run), promise.unit, epsilon, delta, note, spent))
    return found
