"""The proposal: from a source of data to the settings of a recipe that runs on it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core import environment
from ..core.errors import DataError, nearest
from ..data.cells import Row, cell_text
from ..data.conversations import with_conversation_columns
from ..data.examples import LearningTask, label_names, make_examples
from ..data.settings import CHOSEN, MESSAGES, REJECTED, DataSettings, TaskKind
from ..data.sources import BUILTIN, read_rows, require_columns
from ..data.splits import DEVELOPMENT, TEST, find_splits, scoring_split, training_split
from ..data.templates import fields
from ..models.configuration import context_length, load_configuration
from ..models.load import Base, choose_device, has_chat_template, load_base
from ..models.settings import ModelSettings
from ..recipe.recipe import Recipe, parse_recipe
from ..recipe.start import STARTING_METHOD, STARTING_SETTINGS
from .base import PLAIN_TEMPLATE, fitting_base
from .columns import profile
from .lengths import Lengths, measure_lengths
from .questions import Decide, Question, take_proposals
from .readings import (
    INSTRUCTED,
    Columns,
    choose_client,
    choose_found,
    choose_label,
    choose_task,
    choose_text,
    choose_written,
    conversations,
    first_pair,
    no_label,
)  # fmt: skip

TEMPLATES = ("text", "prompt", "target")
"""Options of templates, for which the name of one column may stand."""

LEAST_ROWS = 6
"""Rows of two clients that each have one to train on, one to select by and one to be tested on."""

CLIENTS, ROWS_OF_A_CLIENT = 10, 20
"""Clients that rows are assigned to at most, and rows that each has then at least, if there are so many."""


@dataclass(frozen=True)
class Choices:
    """What a user has decided beforehand; None is left to the data. ``text``, ``prompt`` and ``target`` are
    templates or names of columns; ``client`` may be ``none``.
    """

    task: str | None = None
    text: str | None = None
    label: str | None = None
    prompt: str | None = None
    target: str | None = None
    client: str | None = None
    base: str | None = None
    train: str | None = None
    subset: str | None = None


@dataclass(frozen=True)
class Line:
    """One setting of a proposed recipe, and why it has its value."""

    section: str
    key: str
    value: Any
    comment: str = ""


@dataclass(frozen=True)
class Proposal:
    """A proposed recipe.

    Attributes:
        source: where the data are.
        task: what is learnt.
        rows: how many rows the training split has.
        lines: its settings, in the order in which they are written.
        notes: sentences on what was seen and left out.
    """

    source: str
    task: TaskKind
    rows: int
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()

    def values(self) -> dict[str, Any]:
        """The recipe's tables."""
        found: dict[str, Any] = {}
        for line in self.lines:
            table = found if not line.section else found.setdefault(line.section, {})
            table[line.key] = line.value
        return found

    def recipe(self) -> Recipe:
        """The recipe, checked.

        Raises:
            RecipeError: see :func:`~fedcustom.recipe.recipe.parse_recipe`.
        """
        return parse_recipe(self.values(), f"the recipe proposed for {self.source}")


@dataclass
class _Draft:
    """What has been decided so far."""

    lines: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def set(self, key: str, value: Any, comment: str = "") -> None:
        section, _, name = key.rpartition(".")
        self.lines.append(Line(section, name, value, comment))


def propose(source: str, choices: Choices | None = None, decide: Decide = take_proposals) -> Proposal:
    """Propose a recipe for data, from names and values of columns, and from the memory of this machine.

    Args:
        source: as ``data.source``: a file, a folder, a hub id or ``builtin:docstrings``.
        choices: what has been decided beforehand.
        decide: answers each question that is left; by default the proposal is taken, where there is one.

    Raises:
        DataError: the source cannot be read, or the data do not say what is asked and nobody else does; names
            the option that says it.
        ModelError: the base model cannot be loaded.
    """
    choices = choices or Choices()
    splits = find_splits(source, choices.subset)
    if choices.train is not None and choices.train not in splits:
        raise DataError(f"--train {choices.train}: no such split{nearest(choices.train, splits)}")
    train = choices.train or training_split(splits, source)
    reads = DataSettings(source=source, subset=choices.subset, train=train)
    rows = read_rows(reads, train)
    if len(rows) < LEAST_ROWS:
        raise DataError(
            f"{source}: split {train!r} has {len(rows)} row{'s' * (len(rows) != 1)}; at least {LEAST_ROWS} "
            "are needed, for two clients with one each to train on, to select by and to be tested on"
        )
    columns = profile(rows)
    decide = _decided(choices, decide)
    task = choose_task(columns, source, decide)
    draft = _Draft()
    base = _choose_base(task, decide)
    draft.set("seed", 0)
    draft.set("model.base", *base)
    draft.set("data.source", source, f"{len(rows)} rows")
    if choices.subset is not None:
        draft.set("data.subset", choices.subset)
    if train != "train":
        draft.set("data.train", train)
    used = _set_columns(draft, task, columns, source, decide, choices)
    _set_scoring_splits(draft, splits, train)
    owner = choose_client(columns, used, source, decide) if source != BUILTIN else "package"
    data = DataSettings.model_validate(_section(draft, "data"))
    require_columns(rows, used, f"{source}, {train}")
    _set_lengths(draft, data, base[0], rows)
    _set_clients(draft, rows, owner)
    draft.set("method.name", STARTING_METHOD[task], "fedcustom recipe --help-all method lists the others")
    for section, settings in STARTING_SETTINGS[task].items():
        for key, value in settings.items():
            draft.set(f"{section}.{key}", value)
    if data.texts_are_scored:
        draft.set(
            "evaluation.generate_limit", 20, "test inputs that are answered in words; the loss is of all"
        )
    if task == "retrieval" and importlib.util.find_spec("lancedb") is None:
        draft.notes.append("a run keeps documents in LanceDB: pip install 'fedcustom[retrieval]'")
    left = [name for name in columns if name not in used and name != owner]
    if left:
        draft.notes.append(f"columns that are not used: {', '.join(left[:20])}{', ...' * (len(left) > 20)}")
    return Proposal(source, task, len(rows), tuple(draft.lines), tuple(draft.notes))


def _decided(choices: Choices, decide: Decide) -> Decide:
    """Answers what has been decided beforehand; a template that names no column is that column's name."""

    def answer(question: Question) -> str:
        given = getattr(choices, question.option)
        found = str(given) if given is not None else decide(question)
        return f"{{{found}}}" if question.option in TEMPLATES and "{" not in found else found

    return answer


def _choose_base(task: TaskKind, decide: Decide) -> tuple[str, str]:
    memory = environment.free_memory(choose_device("auto"))
    name, reason = fitting_base(task, memory)
    answer = decide(Question("base", f"Base model ({name}: {reason})", (name,), name, free=True))
    return answer, reason if answer == name else ""


def _set_columns(
    draft: _Draft, task: TaskKind, columns: Columns, source: str, decide: Decide, choices: Choices
) -> list[str]:
    """Set the task and what it reads; returns the columns that are read.

    Raises:
        DataError: a column that is read is empty in some rows; or see :mod:`~.readings`.
    """
    used: list[str] = []
    if task == "classification":
        label = choose_label(columns, source, decide)
        text = choose_text(columns, label, source, decide)
        draft.set("data.text", text)
        draft.set("data.label", label, f"{columns[label].distinct} labels")
        used = [*fields(text), label]
        if columns[label].distinct in (1, columns[label].rows):
            raise DataError(f"{source}: {no_label(columns[label])}")
    else:
        draft.set("data.task", task)
        if task == "preference":
            used = [name for name in ("prompt", CHOSEN, REJECTED) if name in columns]
        elif task == "chat" and not (choices.prompt or choices.target) and conversations(columns):
            used = [conversations(columns)[0]]
            if used != [MESSAGES]:
                draft.set("data.messages", used[0])
        else:
            choose = choose_found if task == "retrieval" else choose_written
            prompt, target = choose(columns, source, decide)
            used = [*fields(prompt), *fields(target)]
            draft.set("data.prompt", f"{prompt}\n" if task == "generation" else prompt)
            draft.set("data.target", target)
            pair = first_pair(columns, INSTRUCTED)
            for name, column in columns.items():
                if pair and name.lower() == "input" and name not in used and column.missing:
                    draft.notes.append(f"column {name!r} {column.problem}, so that no prompt holds it")
    for name in dict.fromkeys(used):
        if name not in columns:
            raise DataError(f"{source}: no column {name!r}{nearest(name, list(columns))}")
        if problem := columns[name].problem:
            raise DataError(f"{source}: column {name!r} {problem}; fill or leave out these rows")
    return list(dict.fromkeys(used))


def _set_scoring_splits(draft: _Draft, splits: Sequence[str], train: str) -> None:
    others = [name for name in splits if name != train]
    taken = list[str]()
    for key, names in (("development", DEVELOPMENT), ("test", TEST)):
        if (name := scoring_split(others, names)) is not None:
            draft.set(f"data.{key}", name)
            taken.append(name)
    if rest := [name for name in others if name not in taken]:
        draft.notes.append(f"splits that are not used: {', '.join(rest[:20])}{', ...' * (len(rest) > 20)}")


def _section(draft: _Draft, section: str) -> dict[str, Any]:
    return {line.key: line.value for line in draft.lines if line.section == section}


def _set_lengths(draft: _Draft, data: DataSettings, name: str, rows: Sequence[Row]) -> None:
    """Set lengths by the base's tokenizer, and a chat template where the base has none."""
    where = f"{data.source}, {data.train}"
    labels = label_names(rows, data.label, where) if data.task == "classification" else ()
    found = with_conversation_columns(data, list(rows[0]))
    examples = make_examples(rows, found, labels, scoring=False, where=where)
    needs = found.task == "chat" or (found.task == "preference" and len(examples[0].messages) > 1)
    if needs and not has_chat_template(ModelSettings(base=name)):
        draft.set("data.chat_template", PLAIN_TEMPLATE, f"{name} has none of its own")
        found = found.model_copy(update={"chat_template": PLAIN_TEMPLATE})
    base = _loaded(name, found, labels)
    configuration = load_configuration(ModelSettings(base=name))
    lengths = measure_lengths(base, examples, found, context_length(configuration))
    seen = f"of {lengths.sampled} rows the longest input has {lengths.longest} tokens"
    draft.set("data.max_length", lengths.input, seen)
    _set_target_length(draft, found, lengths)
    if base.chat is not None and lengths.longest > lengths.input:
        draft.set("data.too_long", "leave-out", "conversations that do not fit are left out and counted")


def _set_target_length(draft: _Draft, data: DataSettings, lengths: Lengths) -> None:
    if lengths.target is None:
        return
    what = "document" if data.task == "retrieval" else "answer"
    draft.set("data.max_target_length", lengths.target, f"the longest {what} has {lengths.longest_target}")


def _loaded(name: str, data: DataSettings, labels: Sequence[str]) -> Base:
    head = data.task == "classification"
    return load_base(ModelSettings(base=name), LearningTask.of(data, labels), 0, head=head)


def _set_clients(draft: _Draft, rows: Sequence[Row], owner: str | None) -> None:
    if owner is None:
        count = max(2, min(CLIENTS, len(rows) // ROWS_OF_A_CLIENT))
        comment = "no column says whose a row is: rows are assigned to clients at random"
        draft.set("clients.partition", "iid", comment)
        draft.set("clients.count", count)
        return
    names = {cell_text(row, owner, row.place) for row in rows}
    draft.set("clients.partition", "natural")
    draft.set("clients.column", owner, f"{len(names)} clients")
