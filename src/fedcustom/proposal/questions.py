"""What a proposal has to decide, and who decides: the data alone, or a user who is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..core.errors import DataError


@dataclass(frozen=True)
class Question:
    """One decision.

    Attributes:
        option: the option by which a user decides beforehand, without dashes.
        text: the question.
        candidates: the answers that are offered; an answer may be another where ``free``.
        proposal: the answer that the data suggest; None where several are of equal standing, or none.
        reason: why there is no proposal, as a sentence without a full stop.
        free: whether any other text is an answer too, such as a template.
        others: further answers that are allowed and not offered.
    """

    option: str
    text: str
    candidates: tuple[str, ...]
    proposal: str | None = None
    reason: str = ""
    free: bool = False
    others: tuple[str, ...] = ()

    def allows(self, answer: str) -> bool:
        """Whether a text answers the question."""
        return bool(answer) and (self.free or answer in (*self.candidates, *self.others))


Decide = Callable[[Question], str]
"""From a question to its answer."""


def take_proposals(question: Question) -> str:
    """The answer that the data suggest.

    Raises:
        DataError: there is none; says which option to give.
    """
    if question.proposal is None:
        listed = ", ".join(question.candidates[:12]) + (", ..." if len(question.candidates) > 12 else "")
        among = f" (one of: {listed})" if listed else ""
        raise DataError(f"{question.reason}; pass --{question.option}{among}")
    return question.proposal
