"""Examples, and the columns they are made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..core.errors import DataError
from .cells import cell_text, cell_texts, in_order, place_of
from .conversations import Message, Messages, conversation_columns, conversation_of
from .preferences import pair_columns, pair_of
from .settings import DataSettings
from .templates import Field, fields, fill, places


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled input: ``label`` for classification, ``target`` and ``references`` for generation.
    ``options`` are the answers among which a model is to choose; unless there are none, the target is one.

    ``fields`` says which characters of the text come from which column; empty where that is not known.

    Of a conversation, ``target`` is the last answer, ``messages`` is all that precedes it, and ``text`` the
    last message of that, in most cases a user's turn. ``where`` is its file and line, for messages.

    Of a preference pair, ``target`` is the chosen answer and ``rejected`` the other one.
    """

    text: str
    label: int = -1
    target: str = ""
    references: tuple[str, ...] = ()
    fields: tuple[Field, ...] = field(default=(), compare=False)
    messages: Messages = ()
    where: str = field(default="", compare=False)
    options: tuple[str, ...] = ()
    rejected: str = ""

    @property
    def right_option(self) -> int:
        """The number of the option that is the target, from 0."""
        return [option.strip() for option in self.options].index(self.target.strip())

    def with_text(self, text: str) -> Example:
        """The same with an altered text of about the same form: its columns grow or shrink alike."""
        share = len(text) / max(1, len(self.text))
        moved = (Field(f.name, round(share * f.start), round(share * f.end)) for f in self.fields)
        messages = self.messages
        if messages:
            messages = (*messages[:-1], Message(messages[-1].role, text))
        return replace(self, text=text, fields=tuple(moved), messages=messages)


@dataclass(frozen=True, slots=True)
class LearningTask:
    """What is learnt: its kind and, for classification, the names of the labels in the order of their
    numbers.

    To answer in conversations (``chat``) is to generate; ``chat_template`` is the text of the template where
    that is not the tokenizer's own, ``system`` the system message of conversations that have none.

    To write the answers that are preferred (``preference``) is to generate, too. Its prompts are
    conversations (``chat``) where the model has a template of them, which shows when it is loaded; else plain
    texts.
    """

    kind: Literal["classification", "generation", "retrieval"]
    labels: tuple[str, ...] = ()
    chat: bool = False
    chat_template: str | None = None
    system: str | None = None
    preference: bool = False

    @classmethod
    def of(cls, data: DataSettings, labels: Sequence[str] = ()) -> LearningTask:
        """The task of a recipe, with labels as they were found in the data."""
        if data.task == "chat" or data.task == "preference":
            return cls(
                "generation", chat=True, chat_template=data.chat_template, system=data.system,
                preference=data.task == "preference",
            )  # fmt: skip
        return cls(data.task, tuple(labels))

    @property
    def texts_are_scored(self) -> bool:
        """Whether evaluation may have texts written: not for labels, nor for pairs of answers."""
        return self.kind != "classification" and not self.preference


@dataclass(frozen=True, slots=True)
class ClientData:
    """One client's private examples, split into what it trains on, helps to select on and is evaluated on."""

    name: str
    train: list[Example]
    development: list[Example] = field(default_factory=list)
    test: list[Example] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class FederatedData:
    """All clients of a simulation, and the development and test sets that belong to no single one of them.

    Where the recipe names no development or test split, these are the clients' own parts, taken together in
    the clients' order; ``test_is_pooled`` says so of the test set. ``public`` has texts alone.
    """

    task: LearningTask
    clients: Mapping[str, ClientData]
    development: list[Example]
    test: list[Example]
    test_is_pooled: bool
    public: list[Example] = field(default_factory=list)


def columns(settings: DataSettings, *, scoring: bool) -> tuple[str, ...]:
    """The columns that a split must have; ``scoring`` splits may have references in place of the target.

    Where the recipe names no test split, clients' test parts come out of the training rows, which then need
    the columns of scores too.
    """
    if settings.task == "classification":
        return (*fields(settings.text), settings.label)
    if settings.task == "preference":
        return pair_columns(settings)
    scored = scoring or settings.test is None
    scores = [name for name in (settings.references, settings.options) if scored and name is not None]
    if settings.task == "chat":
        return (*conversation_columns(settings), *scores)
    target = () if scoring and settings.references is not None else fields(settings.target)
    return (*fields(settings.prompt), *target, *scores)


def label_names(rows: Iterable[Mapping[str, Any]], column: str, where: str) -> tuple[str, ...]:
    """The labels that occur, as text, in their order (:func:`~.cells.in_order`).

    Raises:
        DataError: a row has no label, or one that is no plain value.
    """
    return in_order(cell_text(row, column, f"{where}, {place_of(row, n)}") for n, row in enumerate(rows))


def make_examples(
    rows: Sequence[Mapping[str, Any]],
    settings: DataSettings,
    labels: Sequence[str],
    *,
    scoring: bool,
    where: str,
) -> list[Example]:
    """Turn rows into examples.

    Raises:
        DataError: a cell that is empty or no plain value, or a label that the training split does not have;
            names the split, the line and the column.
    """
    numbers = {label: number for number, label in enumerate(labels)}
    examples = []
    for position, row in enumerate(rows):
        here = f"{where}, {place_of(row, position)}"
        if settings.task == "preference":
            examples.append(_pair_example(row, settings, here))
            continue
        if settings.task != "classification":
            make = _chat_example if settings.task == "chat" else _generation_example
            examples.append(_with_scores(make(row, settings, scoring, here), row, settings, scoring, here))
            continue
        example, label = input_of(settings.text, row, here), cell_text(row, settings.label, here)
        if label not in numbers:
            raise DataError(f"{here}: label {label!r} is not among the training labels")
        examples.append(replace(example, label=numbers[label]))
    return examples


def rendered(template: str, row: Mapping[str, Any], where: str) -> str:
    """The text that a template makes of a row.

    Raises:
        DataError: a column that it names is missing, empty or no plain value.
    """
    return fill(template, {name: cell_text(row, name, where) for name in fields(template)})


def input_of(template: str, row: Mapping[str, Any], where: str) -> Example:
    """The text that a template makes of a row, as an example without label or target.

    Raises:
        DataError: see :func:`rendered`.
    """
    values = {name: cell_text(row, name, where) for name in fields(template)}
    return Example(fill(template, values), fields=places(template, values))


def asked_in(messages: Messages, where: str = "") -> Example:
    """A conversation that is to be answered, as an example without a target."""
    return Example(messages[-1].content, messages=messages, where=where)


def _chat_example(row: Mapping[str, Any], settings: DataSettings, scoring: bool, where: str) -> Example:
    messages = conversation_of(row, settings, where, answered=True)
    target = messages[-1].content
    return replace(asked_in(messages[:-1], where), target=target, references=(target.strip(),))


def _pair_example(row: Mapping[str, Any], settings: DataSettings, where: str) -> Example:
    pair = pair_of(row, settings, where)
    asked = asked_in(pair.prompt, where)
    return replace(asked, target=pair.chosen, references=(pair.chosen.strip(),), rejected=pair.rejected)


def _generation_example(row: Mapping[str, Any], settings: DataSettings, scoring: bool, where: str) -> Example:
    example = input_of(settings.prompt, row, where)
    names = fields(settings.target)
    if scoring and settings.references is not None and any(row.get(name) in (None, "") for name in names):
        # The loss of a row without a target is taken on the first reference, in the form in which the model
        # learns to write it.
        target = _as_target(cell_texts(row, settings.references, where)[0], settings)
    else:
        target = rendered(settings.target, row, where)
    return replace(example, target=target, references=(target.strip(),))


def _as_target(text: str, settings: DataSettings) -> str:
    """A text in the target's place, in the form of the target's template where that names one column."""
    names = set(fields(settings.target))
    if settings.messages is not None or len(names) != 1:
        return text
    return fill(settings.target, {names.pop(): text})


def _with_scores(
    example: Example, row: Mapping[str, Any], settings: DataSettings, scoring: bool, where: str
) -> Example:
    """The example with what answers are scored by: references and options. Training rows need them where
    clients' test parts come out of these (:func:`columns`), and may have them elsewhere.
    """
    scored = scoring or settings.test is None
    column = settings.references
    if column is not None and (scored or row.get(column) is not None):
        example = replace(example, references=cell_texts(row, column, where))
    column = settings.options
    if column is None or not (scored or row.get(column) is not None):
        return example
    options = tuple(_as_target(text, settings) for text in cell_texts(row, column, where))
    distinct = [text.strip() for text in options]
    if len(options) < 2 or len({*distinct}) < len(options):
        raise DataError(f"{where}: column {column!r} must hold a list of two or more different texts")
    if example.target.strip() not in distinct:
        raise DataError(
            f"{where}: the target is none of the {len(options)} texts in column {column!r} (data.options)"
        )
    return replace(example, options=options)
