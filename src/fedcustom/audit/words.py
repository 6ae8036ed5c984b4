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


def place(finding: Finding) -> str:
    """The round; a dash for what is no round's."""
    return str(finding.round) if finding.round else "–"


def where(finding: Finding) -> str:
    """The round in words."""
    return f"round {finding.round}" if finding.round else "whole run"


def bound(finding: Finding, audit: Audit) -> str:
    """A lower bound on epsilon beside what the run promises."""
    return (
        f"{where(finding)}, {finding.attack} on a {finding.view}: epsilon is at least "
        f"{finding.epsilon:.2f} ({100 * finding.confidence:g} % confidence, delta = {audit.delta:g}), and "
        f"{audit.promised_epsilon:g} is promised"
    )


def replayed(audit: Audit) -> str:
    """How the rounds that were attacked were checked, and what the run promises."""
    promised = audit.promised_epsilon
    promise = f"promised epsilon: {'none' if promised is None else f'{promised:g}'}"
    kept = ", ".join(str(each.round) for each in audit.rounds if each.recorded)
    again = ", ".join(str(each.round) for each in audit.rounds if not each.recorded)
    exact = ", ".join(str(each.round) for each in audit.rounds if each.bit_equal and not each.recorded)
    said = "no round was looked at"
    if kept:
        said = f"rounds {kept}: states as they were kept while the run went"
    elif again:
        said = f"repeated rounds {again}: cohorts, losses, norms and bytes as recorded"
        said += f"; state of round {exact} bit-equal to its checkpoint" if exact else ""
    return f"{said}; {promise}"
