"""Messages of retrieval, beside those of training its encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from ..contents import Content
from ..messages import Positive, RoundTask, Task, Update, Whole, message_kinds

Digest = Annotated[str, Field(pattern="^[0-9a-f]{12,128}$")]
"""The digest of an encoder, of which clients make the name of a folder."""

Documents = Annotated[list[str], Field(max_length=100_000, fail_fast=True)]
"""Names of documents."""

Texts = Annotated[list[str], Field(max_length=1_000_000, fail_fast=True)]
"""Texts of queries."""


@dataclass(frozen=True, kw_only=True)
class CountTask(RoundTask):
    """Tell the number of documents."""

    kind: ClassVar[str] = "count"
    contents: ClassVar[tuple[Content, ...]] = ("counts",)


@dataclass(frozen=True, kw_only=True)
class CountUpdate(Update):
    """A client's number of documents."""

    documents: Whole


@dataclass(frozen=True, kw_only=True)
class IndexTask(Task):
    """Index the documents with the encoder in ``tensors``, whose digest is ``encoder``."""

    kind: ClassVar[str] = "index"
    contents: ClassVar[tuple[Content, ...]] = ("counts",)

    encoder: Digest


@dataclass(frozen=True, kw_only=True)
class IndexUpdate(CountUpdate):
    """A client's numbers of documents and of chunks that it has indexed."""

    chunks: Whole


@dataclass(frozen=True, kw_only=True)
class RouteTask(Task):
    """Send sums over the vectors of the own questions."""

    kind: ClassVar[str] = "route"
    contents: ClassVar[tuple[Content, ...]] = ("sums", "counts")


@dataclass(frozen=True, kw_only=True)
class RouteUpdate(Update):
    """Sums over the vectors of so many ``questions``."""

    questions: Positive


@dataclass(frozen=True, kw_only=True)
class CalibrateTask(Task):
    """Send the router's mass before the client, the router's output number ``own``, for each development
    question.
    """

    kind: ClassVar[str] = "calibrate"
    contents: ClassVar[tuple[Content, ...]] = ("logits",)

    own: Whole


@dataclass(frozen=True, kw_only=True)
class CalibrateUpdate(Update):
    """The masses."""


@dataclass(frozen=True, kw_only=True)
class RetrieveTask(Task):
    """Send the names and scores of the ``top`` documents of each query: by its vector in ``tensors``, by its
    words in ``texts``, or by both.
    """

    kind: ClassVar[str] = "retrieve"
    contents: ClassVar[tuple[Content, ...]] = ("vectors",)

    encoder: Digest
    top: Annotated[int, Field(ge=1, le=1_000_000)]
    texts: Texts | None = None

    @property
    def queries_asked(self) -> int:
        """As many as there are vectors or texts."""
        vectors = self.tensors.get("queries")
        return max(1, 0 if vectors is None or not vectors.dim() else len(vectors), len(self.texts or ()))

    @property
    def documents_asked(self) -> int:
        """The length of each list."""
        return self.top


@dataclass(frozen=True, kw_only=True)
class RetrieveUpdate(Update):
    """Lists of documents."""


@dataclass(frozen=True, kw_only=True)
class DocumentsTask(Task):
    """A task about ``documents`` that a search with this ``encoder`` found; the base class of two."""

    encoder: Digest
    documents: Documents

    @property
    def queries_asked(self) -> int:
        """One."""
        return 1

    @property
    def documents_asked(self) -> int:
        """Those that are named."""
        return len(self.documents)


@dataclass(frozen=True, kw_only=True)
class FetchTask(DocumentsTask):
    """Send a passage of each of the ``documents``: the nearest to the query in ``tensors``, if there is
    one.
    """

    kind: ClassVar[str] = "fetch"
    contents: ClassVar[tuple[Content, ...]] = ("texts",)


@dataclass(frozen=True, kw_only=True)
class FetchUpdate(Update):
    """Passages by the names of their documents."""

    passages: Annotated[dict[str, str], Field(max_length=100_000)]


@dataclass(frozen=True, kw_only=True)
class AnswerTask(DocumentsTask):
    """Answer a question from passages of the ``documents``."""

    kind: ClassVar[str] = "answer"
    contents: ClassVar[tuple[Content, ...]] = ("texts",)

    question: str


@dataclass(frozen=True, kw_only=True)
class AnswerUpdate(Update):
    """The text that a client's generator wrote."""

    answer: str


MESSAGES = message_kinds(
    (CountTask, CountUpdate),
    (IndexTask, IndexUpdate),
    (RouteTask, RouteUpdate),
    (CalibrateTask, CalibrateUpdate),
    (RetrieveTask, RetrieveUpdate),
    (FetchTask, FetchUpdate),
    (AnswerTask, AnswerUpdate),
)
