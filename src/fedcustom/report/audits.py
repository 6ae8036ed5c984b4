"""Audit section of a report: what attacks on the runs' own updates and states found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..audit import words as said
from ..audit.results import Audit, read_audit
from . import formatting as words
from .groups import Group


@dataclass(frozen=True, slots=True)
class AuditRow:
    """One finding as a reader sees it."""

    attack: str
    view: str
    round: str
    measure: str
    success: str
    interval: str
    chance: str
    candidates: str
    meaning: str


@dataclass(frozen=True, slots=True)
class AuditTable:
    """The findings of one run beside its quality and bytes; ``not_run`` has the attacks that were not made,
    ``broken`` the promises that a lower bound contradicts.
    """

    run: str
    quality: str
    sent: str
    replay: str
    rows: list[AuditRow]
    not_run: list[str]
    broken: list[str]


def audit_tables(groups: Sequence[Group], metric: str) -> list[AuditTable]:
    """A table for each run that has been audited.

    Raises:
        RunError: an ``audit.json`` is malformed.
    """
    found = []
    for group in groups:
        for run in group.runs:
            audit = read_audit(run.directory)
            if audit is None:
                continue
            summary = run.summary
            quality = words.score(float(summary.metrics.get(metric, float("nan"))), metric)
            found.append(
                AuditTable(
                    run=f"{words.capitalised(group.label)}, seed {summary.seed}",
                    quality=f"{words.metric_name(metric)} {quality}",
                    sent=f"{words.byte_count(summary.bytes.up_total)} up in all",
                    replay=said.replayed(audit),
                    rows=_rows(audit),
                    not_run=[_not_run(audit, place) for place in range(len(audit.not_run))],
                    broken=[said.bound(each, audit) for each in audit.broken],
                )
            )
    return found


def _rows(audit: Audit) -> list[AuditRow]:
    return [
        AuditRow(
            each.attack,
            each.view,
            said.place(each),
            each.measure,
            said.success(each),
            said.interval(each),
            said.chance(each),
            said.count(each.candidates),
            each.meaning,
        )
        for each in audit.findings
    ]


def _not_run(audit: Audit, place: int) -> str:
    left = audit.not_run[place]
    where = "" if left.round is None else f", round {left.round}"
    return f"{left.attack}{where}: {left.reason}"
