"""Messages of the base model as it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from ..contents import Content
from ..messages import Positive, RoundTask, Update, message_kinds

MOST = 1_000_000
"""Examples, and turns of one, that a message holds at most."""


@with_config(ConfigDict(strict=True, extra="forbid"))
class Turn(TypedDict):
    """One message of a conversation."""

    role: Literal["user", "assistant", "tool"]
    content: str


@with_config(ConfigDict(strict=True, extra="forbid"))
class Shot(TypedDict):
    """A training example: what is asked, and the answer. A prompt that is no conversation is a user's
    turn.
    """

    messages: Annotated[list[Turn], Field(min_length=1, max_length=MOST)]
    answer: str


@dataclass(frozen=True, kw_only=True)
class ShotsTask(RoundTask):
    """Draw as many training examples as the recipe says (``method.shots``)."""

    kind: ClassVar[str] = "shots"
    contents: ClassVar[tuple[Content, ...]] = ("texts", "counts")


@dataclass(frozen=True, kw_only=True)
class ShotsUpdate(Update):
    """The examples that were drawn; ``examples`` is the number of those that they were drawn from."""

    examples: Positive
    shots: Annotated[list[Shot], Field(max_length=MOST)] = field(default_factory=list)


SHOTS = message_kinds((ShotsTask, ShotsUpdate))
