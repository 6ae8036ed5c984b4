"""Results of an audit, and ``audit.json``, which holds them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from ..core.errors import RunError
from ..core.files import write_json

FILE = "audit.json"
"""The file of an audit in a run's directory. It holds figures, and no text of a client."""

View = Literal["client's update", "state difference", "sum of clients", "released model"]
"""What an attacker sees: one client's update as the server gets it; the difference of two global states, as
every client sees it; the sum of a cohort's updates alone; the model that the run ends with.
"""


@dataclass(frozen=True)
class Finding:
    """How far one attack came on one view of one round.

    Attributes:
        attack: The attack's name.
        view: What it saw.
        round: The round; 0 for what is no round's, such as the released model.
        measure: What ``success`` is, such as ``AUC`` or ``texts named``.
        success: From 0 to 1, larger is more disclosed.
        chance: What guessing without the view gives; None where there is nothing to compare with.
        trials: How many guesses were made: sums, texts or clients.
        candidates: Among how many each guess was.
        meaning: One plain sentence.
        low, high: The 95 % interval, where the figure is an estimate.
        epsilon: A lower bound on epsilon, where the attack gives one.
        confidence: Of that bound.
    """

    attack: str
    view: View
    round: int
    measure: str
    success: float
    chance: float | None
    trials: int
    candidates: int
    meaning: str
    low: float | None = None
    high: float | None = None
    epsilon: float | None = None
    confidence: float = 0.95


@dataclass(frozen=True)
class NotRun:
    """An attack that was not made, on a round (None: on all), and why."""

    attack: str
    reason: str
    round: int | None = None


@dataclass(frozen=True)
class CheckedRound:
    """A round that was looked at. ``bit_equal``: it was repeated, and its state was compared with the run's
    own checkpoint; else its recorded figures alone. ``recorded``: it was not repeated, but its states were
    kept while the run went.
    """

    round: int
    bit_equal: bool
    recorded: bool = False


@dataclass(frozen=True)
class Audit:
    """An audit of one run. ``promised_epsilon`` is what the run promises, None where it promises nothing."""

    findings: list[Finding] = field(default_factory=list)
    not_run: list[NotRun] = field(default_factory=list)
    rounds: list[CheckedRound] = field(default_factory=list)
    promised_epsilon: float | None = None
    delta: float | None = None
    seconds: float = 0.0

    @property
    def broken(self) -> list[Finding]:
        """The findings whose lower bound is above what the run promises."""
        promised = self.promised_epsilon
        if promised is None:
            return []
        return [f for f in self.findings if f.epsilon is not None and f.epsilon > promised]


_AUDIT = TypeAdapter(Audit)


def write_audit(directory: Path, audit: Audit) -> Path:
    """Write ``audit.json`` into a run's directory, atomically, and return its path."""
    write_json(directory / FILE, asdict(audit))
    return directory / FILE


def read_audit(directory: Path) -> Audit | None:
    """The audit in a run's directory; None where there is none.

    Raises:
        RunError: it is malformed; names the key.
    """
    path = directory / FILE
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}") from None
    try:
        return _AUDIT.validate_json(content, strict=True)
    except ValidationError as error:
        first: Any = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise RunError(f"{path}: {key + ': ' if key else ''}{first['msg']}") from None
