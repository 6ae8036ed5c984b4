"""Findings in words, for the command's table and the report's."""

from __future__ import annotations

from .results import Audit, Finding


def success(finding: Finding) -> str:
    """The success of an attack."""
    return f"{finding.success:.3f}"


def interval(finding: Finding) -> str:
    """Its 95 % interval; empty where there is none."""
    if finding.low is None or finding.high is None:
        return ""
    return f"{finding.low:.3f} to {finding.high:.3f}"


def chance(finding: Finding) -> str:
    """What guessing gives; a dash where there is nothing to compare with."""
    if finding.chance is None:
        return "–"
    return f"{finding.chance:.3f}" if finding.chance >= 0.0005 or not finding.chance else "<0.001"


def count(number: int) -> str:
    """A number of candidates; a dash for none."""
    if not number:
        return "–"
    return f"{number:,}" if number < 1_000_000 else f"{number / 1e6:.1f} M"


def bound(finding: Finding, audit: Audit) -> str:
    """A lower bound on epsilon beside what the run promises."""
    return (
        f"round {finding.round}, {finding.attack} on a {finding.view}: epsilon is at least "
        f"{finding.epsilon:.2f} (95 % confidence, delta = {audit.delta:g}), and "
        f"{audit.promised_epsilon:g} is promised"
    )


def replayed(audit: Audit) -> str:
    """How the rounds that were attacked were checked, and what the run promises."""
    if not audit.rounds:
        return "no round was repeated"
    rounds = ", ".join(str(each.round) for each in audit.rounds)
    exact = [str(each.round) for each in audit.rounds if each.bit_equal]
    said = f"repeated rounds {rounds}: cohorts, losses, norms and bytes as recorded"
    if exact:
        said += f"; state of round {', '.join(exact)} bit-equal to its checkpoint"
    promised = audit.promised_epsilon
    return f"{said}; promised epsilon: {'none' if promised is None else f'{promised:g}'}"
