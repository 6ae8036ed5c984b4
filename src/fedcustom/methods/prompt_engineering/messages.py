"""Messages of prompt engineering, strategy by strategy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from ..contents import Content
from ..messages import INLINE, LossUpdate, Positive, RoundTask, Update, Whole, Work, message_kinds

Texts = Annotated[list[str], Field(max_length=1_000_000, fail_fast=True)]

MAX_CANDIDATES = 1_000_000

TallyRow = tuple[Positive, float, float]
"""The number of examples on which a candidate was scored, and its sums of rewards and log-likelihoods."""


@with_config(ConfigDict(strict=True, extra="forbid"))
class BredCandidate(TypedDict):
    """A prompt that was bred (:class:`~.templates.Candidate`)."""

    template: str
    labels: Texts
    origin: str


@dataclass(frozen=True, kw_only=True)
class ScoreTask(RoundTask):
    """Score the ``candidates`` (numbers in the pool) on private examples.

    Attributes:
        bred: Those of them that are not in the pool of the recipe, by number.
        work: With ``examples``, the client stands for a cohort.
    """

    kind: ClassVar[str] = "score"
    contents: ClassVar[tuple[Content, ...]] = ("counts",)

    candidates: Annotated[list[Whole], Field(max_length=MAX_CANDIDATES, fail_fast=True)]
    bred: Annotated[dict[str, BredCandidate], Field(max_length=MAX_CANDIDATES)] = field(default_factory=dict)
    work: Work = field(default=Work(), metadata={INLINE: True})


@dataclass(frozen=True, kw_only=True)
class ScoreUpdate(Update):
    """Each candidate's tally, by number, and the number of examples scored."""

    tallies: Annotated[dict[str, TallyRow], Field(max_length=MAX_CANDIDATES)]
    examples: Positive


@dataclass(frozen=True, kw_only=True)
class AnswerQueriesTask(RoundTask):
    """Answer each of so many public ``queries``.

    Attributes:
        answers: The current answers as texts; empty where there are none, or these are in ``tensors``.
    """

    kind: ClassVar[str] = "answer"
    contents: ClassVar[tuple[Content, ...]] = ("logits", "counts")

    queries: Whole
    answers: Texts


@dataclass(frozen=True, kw_only=True)
class AnswerQueriesUpdate(Update):
    """Answers to the queries, as texts for generation and else in ``tensors``; ``examples`` is the number of
    private ones that could be in the context.
    """

    examples: Positive
    answers: Texts | None = None


@dataclass(frozen=True, kw_only=True)
class SearchTask(RoundTask):
    """Search from the distribution in ``tensors``, with step size ``sigma``."""

    kind: ClassVar[str] = "search"
    contents: ClassVar[tuple[Content, ...]] = ("updates", "counts")

    sigma: float


@dataclass(frozen=True, kw_only=True)
class SearchUpdate(LossUpdate):
    """The distribution that a client arrived at, with its step size and the loss at its mean."""

    sigma: float


@dataclass(frozen=True, kw_only=True)
class AloneTask(RoundTask):
    """Do one round of the method by yourself."""

    kind: ClassVar[str] = "alone"


@dataclass(frozen=True, kw_only=True)
class AloneUpdate(Update):
    """The number of examples that a round took."""

    examples: Positive


SELECTION = message_kinds((ScoreTask, ScoreUpdate))
IN_CONTEXT = message_kinds((AnswerQueriesTask, AnswerQueriesUpdate))
BLACK_BOX = message_kinds((SearchTask, SearchUpdate))
ALONE = message_kinds((AloneTask, AloneUpdate))
