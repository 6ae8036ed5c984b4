"""The recipe's sections on data and on how it is spread over clients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from ..core import plugins
from ..core.settings import Settings
from .templates import checked, fields
from .truncation import AUTO, Truncation

TaskKind = Literal["classification", "generation", "chat", "preference", "retrieval"]

MESSAGES, PROMPT, COMPLETION = "messages", "prompt", "completion"
"""Columns in which conversations stand where the recipe names none."""

CHOSEN, REJECTED = "chosen", "rejected"
"""Columns of the two answers of a preference pair where the recipe names none."""

BuiltInPartition = Literal["natural", "iid", "dirichlet", "quantity", "pathological"]

OFFERED_PARTITIONS = plugins.offered(plugins.PARTITIONS, get_args(BuiltInPartition))
"""Partitions of other packages by name (:mod:`~.partition`), of which none is imported yet."""

if TYPE_CHECKING:
    PartitionKind = str
else:
    PartitionKind = Literal[(*get_args(BuiltInPartition), *OFFERED_PARTITIONS)]


def is_template(value: str) -> bool:
    """Whether a value of ``data.chat_template`` is a template itself, and not the path of its file."""
    return "{{" in value or "{%" in value


ONLY_FOR: dict[str, tuple[TaskKind, ...]] = {
    "messages": ("chat",),
    "system": ("chat", "preference"),
    "chat_template": ("chat", "preference"),
    "chosen": ("preference",),
    "rejected": ("preference",),
    "too_long": ("chat", "preference"),
    "references": ("generation", "chat"),
    "options": ("generation", "chat"),
}
"""Settings of data that some tasks alone read."""


def _either(tasks: tuple[TaskKind, ...]) -> str:
    return " or ".join(map(repr, tasks))


class DataSettings(Settings):
    """Where examples come from and how their columns become a task."""

    source: str = Field(
        "builtin:docstrings",
        description="builtin:docstrings, a JSONL, CSV or Parquet file, a folder of such files, or a hub id",
    )
    subset: str | None = Field(None, description="Configuration of a hub data set that has several")
    task: TaskKind = Field(
        "classification",
        description="What is learnt: a label, a text, the assistant's turns of conversations, which of two "
        "answers is preferred, or which document answers",
    )
    train: str = Field(
        "train", description="Training split: a split's name or a file's name without its ending"
    )
    development: str | None = Field(
        None, description="Development split, used for selection; unset: a part of each client's data"
    )
    test: str | None = Field(None, description="Test split; unset: the clients' own test parts together")
    text: str = Field(
        "{text}", description="Classification: template of the input; {column} stands for a column"
    )
    label: str = Field("label", description="Classification: the column that holds the label")
    prompt: str = Field(
        "{source}",
        description="Generation: template of what the model is given; preference: of the prompt, text or "
        "messages (unset: {prompt}, where there is that column); retrieval: of the question",
    )
    target: str = Field(
        "{target}",
        description="Generation: template of what the model is to write; retrieval: of the document",
    )
    chosen: str | None = Field(
        None,
        description="Preference: template of the preferred answer, a text or messages; unset: {chosen}",
    )
    rejected: str | None = Field(
        None, description="Preference: template of the other answer, likewise; unset: {rejected}"
    )
    messages: str | None = Field(
        None,
        description="Chat: column with the list of messages (role, content); unset: 'messages' or, where "
        "there is none, 'prompt' and 'completion'; where prompt or target is set, a user's turn and its "
        "answer are made by these templates",
    )
    system: str | None = Field(
        None,
        min_length=1,
        description="Chat, preference: system message of conversations that have none of their own",
    )
    chat_template: str | None = Field(
        None,
        min_length=1,
        description="Chat, preference: Jinja file of the template by which messages become one text, or the "
        "template itself; unset: the tokenizer's own",
    )
    references: str | None = Field(
        None,
        description="Generation, chat: column with a list of accepted texts, for scoring; unset: the target",
    )
    options: str | None = Field(
        None,
        min_length=1,
        description="Generation, chat: column with a list of answers, of which the target is one; the test "
        "split is scored by which of them the model finds likeliest",
    )
    max_length: int = Field(
        128,
        ge=4,
        le=1_000_000,
        description="Longest input in tokens; truncate says what is cut off (chat: the longest text before "
        "the last answer, which loses whole exchanges, the oldest first; likewise of preference)",
    )
    truncate: str = Field(
        "auto",
        description="What is cut of an input that is too long. auto: the template's longest column; the name "
        "of a column: that one first; longest-first: the longest columns alike (pairs of texts); keep-start, "
        "keep-end: the text as a whole. A column loses its end, in a prompt its beginning; "
        "'context:keep-start' says otherwise",
    )
    max_target_length: int = Field(
        128,
        ge=1,
        le=1_000_000,
        description="Generation: longest target in tokens; chat: longest last answer; preference: longest "
        "answer, chosen or rejected",
    )
    too_long: Literal["refuse", "leave-out"] | None = Field(
        None,
        description="Chat, preference: a conversation whose last exchange alone is longer than max_length is "
        "refused with its line, or left out and counted; unset: refuse",
    )
    limit: int | None = Field(
        None, ge=1, description="Use at most this many training rows, drawn by the seed"
    )
    test_limit: int | None = Field(
        None, ge=1, description="Use at most this many test rows, drawn by the seed"
    )

    _templates = field_validator("text", "prompt", "target", "chosen", "rejected")(checked)

    @model_validator(mode="after")
    def _truncates_what_there_is(self) -> Self:
        if self.task in ("chat", "preference") and self.truncate != AUTO:
            raise ValueError(
                f"data.truncate = {self.truncate!r}: a conversation loses its oldest exchanges; "
                "leave it at 'auto'"
            )
        for key, tasks in ONLY_FOR.items():
            if self.task not in tasks and getattr(self, key) is not None:
                raise ValueError(f"data.{key}: has a meaning for data.task = {_either(tasks)} alone")
        if self.task == "preference" and self._set("target"):
            raise ValueError(
                "data.target: has no meaning for data.task = 'preference'; the answers are those of "
                "data.chosen and data.rejected"
            )
        templates = [key for key in ("prompt", "target") if self._set(key)]
        if self.messages is not None and templates:
            raise ValueError(
                f"data.messages = {self.messages!r}: does not go with data.{templates[0]}; name the column "
                "of conversations or the templates of a turn and its answer"
            )
        Truncation.parse(self.truncate, self._columns)
        return self

    def _set(self, key: str) -> bool:
        return bool(getattr(self, key) != type(self).model_fields[key].default)

    @property
    def writes(self) -> bool:
        """Whether the model learns to write a text: one target, or the answers of a conversation. One that
        learns which answer is preferred is to write such answers.
        """
        return self.task in ("generation", "chat", "preference")

    @property
    def texts_are_scored(self) -> bool:
        """Whether evaluation compares texts that the model writes with those of the data."""
        return self.task in ("generation", "chat")

    @property
    def truncation(self) -> Truncation:
        """``truncate``, parsed. Where a site's own template lacks the column that it names: ``auto``."""
        try:
            return Truncation.parse(self.truncate, self._columns)
        except ValueError:
            return Truncation()

    @property
    def _columns(self) -> tuple[str, ...]:
        return fields(self.text if self.task == "classification" else self.prompt)


class PublicSettings(Settings):
    """An unlabelled set that everybody may see: clients and server compare what their models say of it."""

    source: str | None = Field(
        None,
        description="A file, a folder or a hub id, as data.source; unset: none but the fraction",
    )
    split: str = Field("train", description="Its split: a split's name or a file's name without its ending")
    text: str | None = Field(
        None, description="Template of its texts; unset: data.text (classification) or data.prompt"
    )
    fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Instead of a source: part of the training rows set aside, without labels, for everybody",
    )
    limit: int | None = Field(None, ge=1, description="Use at most this many rows, drawn by the seed")

    _template = field_validator("text")(checked)

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.source is not None and self.fraction:
            raise ValueError("public.source and public.fraction exclude each other: name one of them")
        return self


class ClientSettings(Settings):
    """Who holds the data: natural clients from a column, or a partition."""

    partition: PartitionKind = Field(
        "natural",
        description="natural: by column; iid; dirichlet: label skew; quantity: sizes; pathological: labels",
    )
    column: str | None = Field(None, description="Column that names the client (natural)")
    count: int = Field(10, ge=1, le=1_000_000, description="Number of clients (every partition but natural)")
    alpha: float = Field(
        1.0,
        gt=0,
        le=1e6,
        description="Dirichlet concentration (dirichlet, quantity): the smaller, the more skewed",
    )
    labels_per_client: int = Field(2, ge=1, description="Labels a client holds (pathological)")
    minimum_examples: int = Field(
        3,
        ge=1,
        description="Smallest client; one that a skewed partition leaves below is filled from the largest",
    )
    limit: int | None = Field(
        None, ge=1, description="Use at most this many rows of each client, drawn by the seed"
    )
    development_fraction: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Part of each client's data for selection (0 where a development split is named)",
    )
    test_fraction: float = Field(
        0.1, ge=0, lt=1, description="Part of each client's data on which that client is evaluated"
    )

    @model_validator(mode="after")
    def _parts_leave_something(self) -> Self:
        if self.development_fraction + self.test_fraction >= 1:
            raise ValueError(
                "development_fraction and test_fraction leave nothing to train on: their sum must be below 1"
            )
        return self
