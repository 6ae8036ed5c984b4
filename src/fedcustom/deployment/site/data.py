"""A site's data settings: the columns, templates and labels that its file declares, and reading by them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from pydantic import Field, field_validator

from ...core.errors import DataError, PolicyError
from ...data.cells import cell_text, in_order
from ...data.conversations import with_conversation_columns
from ...data.examples import columns as columns_of
from ...data.party_data import OwnData, OwnDataSettings, read_own
from ...data.settings import MESSAGES, PROMPT, DataSettings, PublicSettings, TaskKind
from ...data.templates import checked, fields
from ...data.truncation import Truncation
from ..replies import MAX_LABEL_CHARACTERS, MAX_LABELS, Label

MAX_LABEL_WORDS = 12

NEEDED: dict[TaskKind, tuple[str, ...]] = {
    "classification": ("text", "label"),
    "generation": ("prompt", "target"),
    "chat": ("messages",),
    "preference": ("prompt", "chosen", "rejected"),
    "retrieval": ("prompt", "target"),
}
"""The columns and templates that each task needs, which a site declares itself."""


class SiteDataSettings(OwnDataSettings):
    """A site's data: the ``[data]`` section of ``site.toml``. Nothing in it is filled in from a recipe."""

    columns: list[str] | None = Field(
        None,
        description="The columns that may be read; all others are dropped when a file is read. Must be set",
    )
    text: str | None = Field(None, description="Classification: template of the input, of declared columns")
    label: str | None = Field(None, description="Classification: column of the label, a declared one")
    labels: list[Label] | None = Field(
        None,
        min_length=1,
        max_length=MAX_LABELS,
        description="Classification: all labels, which the server is told; unset: those that occur, if there "
        "are no more than max_labels",
    )
    max_labels: int | None = Field(
        None,
        ge=1,
        le=MAX_LABELS,
        description="Classification, with labels unset: most distinct labels that the server is told",
    )
    prompt: str | None = Field(
        None,
        description="Generation, preference and retrieval: template of the prompt; preference, unset: chosen "
        "and rejected hold whole conversations",
    )
    target: str | None = Field(None, description="Generation and retrieval: template of the target")
    chosen: str | None = Field(None, description="Preference: template of the preferred answer")
    rejected: str | None = Field(None, description="Preference: template of the rejected answer")
    messages: str | None = Field(
        None,
        description="Chat: column with lists of messages, a declared one; unset: a user's turn and its "
        "answer are made by prompt and target",
    )
    references: str | None = Field(None, description="Generation: column with accepted texts; unset: none")
    options: str | None = Field(
        None, description="Generation: column with the answers to choose from; unset: none"
    )
    public_text: str | None = Field(
        None, description="Template of the public texts; unset: that of the input or of the prompt"
    )

    _public_template = field_validator("public_text")(checked)

    def named_columns(self) -> dict[str, str]:
        """Every column that a template or a setting names, with the setting."""
        named: dict[str, str] = {}
        for key in ("text", "prompt", "target", "chosen", "rejected", "public_text"):
            if (template := getattr(self, key)) is not None:
                named |= dict.fromkeys(fields(template), key)
        named |= {
            name: key
            for key in ("label", "messages", "references", "options")
            if (name := getattr(self, key)) is not None
        }
        return named


def check_declared(own: SiteDataSettings) -> None:
    """Refuse a file whose templates name columns that it does not declare.

    Raises:
        PolicyError: says which line of ``site.toml`` is missing or wrong.
    """
    named = own.named_columns()
    if own.columns is None:
        if own.train is not None or named:
            raise PolicyError(_missing("columns", list(named) or ["text", "label"]))
        return
    for column, key in named.items():
        if column not in own.columns:
            raise PolicyError(
                f"data.{key} names the column {column!r}, which data.columns does not declare; allowed: "
                f"{', '.join(own.columns) or 'none'}"
            )
    if own.truncate is not None:
        try:
            Truncation.parse(own.truncate, fields(own.text or "") + fields(own.prompt or ""))
        except ValueError as error:
            raise PolicyError(str(error)) from None
    texts = [str(label) for label in own.labels or ()]
    if len(set(texts)) < len(texts):
        raise PolicyError("data.labels names a label twice")


def needed(data: DataSettings) -> tuple[str, ...]:
    """The keys of a site's file that a recipe's data settings need."""
    if data.task == "preference" and not data.prompt:
        return NEEDED[data.task][1:]
    return NEEDED["generation"] if data.task == "chat" and data.messages is None else NEEDED[data.task]


def declared_settings(own: SiteDataSettings, data: DataSettings) -> DataSettings:
    """The recipe's data settings with this site's own columns, templates and label column.

    Raises:
        PolicyError: the site's file does not declare what the task needs. The error holds no name that only
            the site's file has.
    """
    data = with_conversation_columns(data, [MESSAGES, PROMPT])
    if data.task == "preference" and own.prompt is None:
        data = data.model_copy(update={"prompt": ""})  # whole conversations, or refused row by row
    if own.columns is None:
        raise PolicyError(_missing("columns", list(dict.fromkeys(columns_of(data, scoring=False)))))
    # Conversations stand in a column or are made by templates, whichever the site has.
    stands = own.messages is not None or (own.prompt is not None and own.target is not None)
    for key in () if data.task == "chat" and stands else needed(data):
        if getattr(own, key) is None:
            raise PolicyError(_missing(key, getattr(data, key)))
    if not own.named_columns().keys() <= set(own.columns):
        raise PolicyError(
            "data.columns lacks a column that a template of this site names; fedcustom site check says which"
        )
    if data.task == "classification" and own.labels is None and own.max_labels is None:
        raise PolicyError(
            'data.labels is not set in this site\'s site.toml; add to [data]: labels = ["...", "..."], or '
            "max_labels = 20 (fedcustom site check lists the labels)"
        )
    keys = ("text", "label", "prompt", "target", "chosen", "rejected", "truncate")
    declared = {key: value for key in keys if (value := getattr(own, key)) is not None}
    own_alone = {key: getattr(own, key) for key in ("messages", "references", "options")}
    return data.model_copy(update={**declared, **own_alone})


def read_site(own: SiteDataSettings, folder: Path, data: DataSettings, public: PublicSettings) -> OwnData:
    """Read a site's files by the site's own declarations; ``folder`` is what paths are relative to.

    Raises:
        PolicyError: see :func:`declared_settings`.
        DataError: a file is missing, empty or malformed, or lacks a column.
    """
    settings = declared_settings(own, data)
    template = own.public_text or (settings.text if data.task == "classification" else settings.prompt)
    shared = public.model_copy(update={"text": template})
    return read_own(own, folder, settings, shared, keep=frozenset(own.columns or ()))


def told_labels(own: SiteDataSettings, data: OwnData) -> list[Label]:
    """The labels that the server is told: those that are declared, or those that occur in the training rows.

    Raises:
        PolicyError: more labels occur than ``max_labels``, or values that look like texts.
        DataError: a training row has a label that is not declared, or a value that is no label.
    """
    if data.settings.task != "classification":
        return []
    column, declared = data.settings.label, own.labels
    known = None if declared is None else {str(label) for label in declared}
    found: dict[str, None] = {}
    for row in data.train:
        label = cell_text(row, column, f"the train file, {row.place}")
        if known is not None and label not in known:
            raise DataError(f"the train file, {row.place}: label {label!r} is not among data.labels")
        found[label] = None
    if declared is not None:
        check_labels(declared, most=MAX_LABELS, longest_words=None)
        return list(declared)
    check_labels(found, most=own.max_labels or 0, longest_words=MAX_LABEL_WORDS)
    return [*in_order(found)]


def check_labels(labels: Iterable[Label], *, most: int, longest_words: int | None) -> None:
    """Refuse to tell values that look like texts as labels. Of declared labels the words are not counted.

    Raises:
        PolicyError: there are more than ``most``, or one is too long for a label.
    """
    values = [str(label) for label in labels]
    if len(values) > most:
        raise PolicyError(f"data.max_labels = {most}: the column of labels has more distinct values")
    if any(len(value) > MAX_LABEL_CHARACTERS for value in values):
        raise PolicyError(f"the column of labels has values of more than {MAX_LABEL_CHARACTERS} characters")
    if longest_words is not None and any(len(value.split()) > longest_words for value in values):
        raise PolicyError(
            f"the column of labels has values of more than {longest_words} words; if they are labels, "
            "declare them in data.labels"
        )


def _missing(key: str, value: object) -> str:
    line = f"{key} = {json.dumps(value, ensure_ascii=False)[:300]}"
    return (
        f"data.{key} is not set in this site's site.toml, and what the recipe says does not count; add to "
        f"[data], with this site's own columns: {line}"
    )
