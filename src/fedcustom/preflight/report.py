"""The result of a check: typed, and as plain values of a stable layout."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ..data.truncation import CutCount
from ..deployment.site.policy import PolicyNeed
from ..federated.callbacks import Outline
from ..federated.resources import Resources

LAYOUT = 1
"""Number of the layout of :meth:`RecipeCheck.to_dict`; a change that breaks readers raises it."""


@dataclass(frozen=True)
class Segment:
    """A piece of an example's text as the model reads it, and whether its tokens are learnt."""

    text: str
    trained: bool


@dataclass(frozen=True)
class ShownExample:
    """A training example as the model reads it.

    Attributes:
        client: whose it is.
        segments: the text of all its tokens, in their order.
        tokens: how many tokens it has.
        trained: how many of them are learnt.
        label: the label that is learnt, of a classifier.
        rejected: of a preference pair, the same with the other answer; ``segments`` have the chosen one.
        document: of retrieval, the document that answers the question in ``segments``.
    """

    client: str
    segments: tuple[Segment, ...]
    tokens: int
    trained: int
    label: str | None = None
    rejected: tuple[Segment, ...] | None = None
    document: str | None = None


@dataclass(frozen=True)
class ClientSize:
    """How many examples a client has of each part, and how many of each label to train on."""

    name: str
    train: int
    development: int
    test: int
    labels: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ClientSizes:
    """The clients: how many, and the smallest, median and largest number of training examples. ``listed`` are
    the first of them, ``more`` the number of those that are not listed; ``labels`` are the training examples
    of all clients by label, without ``more_labels`` further labels.
    """

    count: int
    smallest: int
    median: float
    largest: int
    listed: tuple[ClientSize, ...]
    more: int
    labels: dict[str, int]
    more_labels: int


@dataclass(frozen=True)
class MessageKind:
    """A kind of message that the recipe's method exchanges with a client.

    Attributes:
        kind: its name on the wire.
        asks: what a client is asked to do.
        answer: what the answer is.
        contents: kinds of content that the answer may hold, by which a site's policy allows it.
        down_fields, up_fields: what travels down and up, by name.
        down, up: bytes to and from a client, in the mean; None where they are not known before the run.
    """

    kind: str
    asks: str
    answer: str
    contents: tuple[str, ...]
    down_fields: tuple[str, ...]
    up_fields: tuple[str, ...]
    down: int | None = None
    up: int | None = None


@dataclass(frozen=True)
class RecipeCheck:
    """What a recipe resolves to.

    Attributes:
        settings: the complete recipe, as the run would record it.
        filled: settings that the recipe leaves open, and what they are filled in with.
        rows: how many examples each part has.
        test_is_pooled: whether the test set is the clients' own test parts together.
        clients: who holds the training examples.
        cuts: what is cut of each part or left out of it, in tokens.
        examples: some training examples.
        messages: what travels between server and client.
        policy: what a site has to allow beyond its defaults.
        refused: why a site takes no part whatever its policy; None where one may.
        outline: clients, cohort and bytes of the run.
        resources: memory and time; None where they do not apply or were not asked for.
        notes: what a run would say before its first round.
        inapplicable: parts of the check that do not apply to this recipe, and why.
    """

    settings: dict[str, Any]
    filled: dict[str, Any]
    rows: dict[str, int]
    test_is_pooled: bool
    clients: ClientSizes
    cuts: dict[str, CutCount]
    examples: tuple[ShownExample, ...]
    messages: tuple[MessageKind, ...]
    policy: tuple[PolicyNeed, ...]
    refused: str | None
    outline: Outline
    resources: Resources | None
    notes: tuple[str, ...]
    inapplicable: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, with the number of the layout (docs/start.md)."""
        return {"layout": LAYOUT, **asdict(self)}
