"""Examples, and the columns they are made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import DataError
from .settings import DataSettings, TaskKind
from .templates import fields


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled input: ``label`` for classification, ``target`` and ``references`` for generation."""

    text: str
    label: int = -1
    target: str = ""
    references: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LearningTask:
    """What is learnt: its kind and, for classification, the names of the labels in the order of their
    numbers.
    """

    kind: TaskKind
    labels: tuple[str, ...] = ()


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
    clients: dict[str, ClientData]
    development: list[Example]
    test: list[Example]
    test_is_pooled: bool
    public: list[Example] = field(default_factory=list)


def columns(settings: DataSettings, *, scoring: bool) -> tuple[str, ...]:
    """The columns that a split must have; ``scoring`` splits may have references in place of the target."""
    if settings.task == "classification":
        return (*fields(settings.text), settings.label)
    wanted = fields(settings.prompt)
    if scoring and settings.references is not None:
        return (*wanted, settings.references)
    return (*wanted, *fields(settings.target))


def label_names(rows: Sequence[Mapping[str, Any]], column: str) -> tuple[str, ...]:
    """The labels that occur, as text, in sorted order (numbers in numeric order)."""
    values = {row[column] for row in rows}
    numeric = all(isinstance(value, int | float) for value in values)
    return tuple(str(value) for value in sorted(values, key=None if numeric else str))


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
        DataError: an empty value, or a label that the training split does not have; names the split and the
        row.
    """
    numbers = {label: number for number, label in enumerate(labels)}
    examples, named = [], columns(settings, scoring=scoring)
    for position, row in enumerate(rows):
        for name in named:
            if row[name] is None or row[name] == "":
                raise DataError(f"{where}, row {position + 1}: column {name!r} is empty")
            if isinstance(row[name], str) and any("\ud800" <= letter <= "\udfff" for letter in row[name]):
                raise DataError(f"{where}, row {position + 1}: column {name!r} is not UTF-8 text")
        if settings.task == "classification":
            label = str(row[settings.label])
            if label not in numbers:
                raise DataError(
                    f"{where}, row {position + 1}: label {label!r} is not among the training labels"
                )
            examples.append(Example(settings.text.format_map(row), label=numbers[label]))
        else:
            examples.append(_generation_example(row, settings, scoring, f"{where}, row {position + 1}"))
    return examples


def _generation_example(row: Mapping[str, Any], settings: DataSettings, scoring: bool, where: str) -> Example:
    prompt = settings.prompt.format_map(row)
    if scoring and settings.references is not None:
        value = row[settings.references]
        references = tuple([value] if isinstance(value, str) else value)
        if not references or not all(isinstance(text, str) and text for text in references):
            raise DataError(f"{where}: column {settings.references!r} must hold a text or a list of texts")
        # The loss is taken on the row's own target or, where it has none, on the first reference, in the form
        # in which the model learns to write it.
        names = fields(settings.target)
        if all(isinstance(row.get(name), str) and row[name] for name in names):
            target = settings.target.format_map(row)
        elif len(names) == 1:
            target = settings.target.format_map(dict.fromkeys(names, references[0]))
        else:
            target = references[0]
        return Example(prompt, target=target, references=references)
    target = settings.target.format_map(row)
    return Example(prompt, target=target, references=(target.strip(),))
