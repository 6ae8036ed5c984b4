"""How a table can be read as a task: which of its columns are input, label, target, answers or messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..core.errors import DataError, nearest
from ..data.settings import CHOSEN, MESSAGES, PROMPT, REJECTED, TaskKind
from .columns import Column
from .questions import Decide, Question

Columns = Mapping[str, Column]

TEXTS = (
    "text", "sentence", "review", "body", "content", "comment", "message", "utterance", "tweet", "post",
    "document", "description", "abstract", "query", "question", "title",
)  # fmt: skip
"""Names of columns of inputs, the likeliest first."""

LABELS = {
    "label", "labels", "class", "category", "target", "intent", "sentiment", "topic", "stars", "rating",
    "emotion", "tag", "y",
}  # fmt: skip
"""Words in names of columns of labels."""

CERTAIN = ("label", "labels", "class")
"""Names that no other column than one of labels has."""

PAIRS = (
    ("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("text1", "text2"),
    ("title", "body"), ("title", "text"), ("title", "description"),
)  # fmt: skip
"""Columns that are read together as one input of a classifier."""

INSTRUCTED = (
    ("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("instruction", "response"),
)  # fmt: skip
"""Columns of a user's turn and of its answer."""

WRITTEN = (
    ("question", "answer"), ("source", "target"), ("input", "output"), ("input", "target"),
    ("article", "highlights"), ("article", "summary"), ("document", "summary"), ("dialogue", "summary"),
    ("text", "summary"), ("mr", "ref"),
)  # fmt: skip
"""Columns of what is given and what is to be written."""

CONTEXTS = ("context", "input", "passage")
"""Columns that stand beside a question or an instruction, where every row has one."""

ASKED = ("question", "query", "anchor")
FOUND = ("document", "passage", "positive", "context")
"""Columns of questions and of the documents that answer them."""

OWNERS = {
    "client", "site", "owner", "hospital", "clinic", "ward", "user", "author", "speaker", "customer",
    "institution", "institute", "organisation", "organization", "org", "center", "centre", "department",
    "device", "writer", "package", "branch", "shop", "store", "school", "bank", "tenant", "company",
}  # fmt: skip
"""Words in names of columns that say whose a row is."""

LEAST_OF_A_CLIENT = 3
"""Rows of a client, on average, below which a column is none of clients: training, selection and test."""

NONE = "none"
"""The answer that rows are assigned to clients at random."""


@dataclass(frozen=True)
class Reading:
    """One way to read a table: the task, what speaks for it, and how well names and values fit (the more the
    better; equal numbers are of equal standing).
    """

    task: TaskKind
    reason: str
    standing: int


def readings(columns: Columns) -> list[Reading]:
    """The ways in which a table can be read, the best first."""
    found = sorted(_readings(columns), key=lambda one: -one.standing)
    return list({one.task: one for one in reversed(found)}.values())[::-1]


def _readings(columns: Columns) -> Iterator[Reading]:
    if CHOSEN in columns and REJECTED in columns:
        yield Reading("preference", f"it has columns {CHOSEN!r} and {REJECTED!r}", 5)
    for name in conversations(columns):
        if name not in (CHOSEN, REJECTED, PROMPT):
            yield Reading("chat", f"column {name!r} holds lists of messages", 4)
    if pair := first_pair(columns, INSTRUCTED):
        yield Reading("chat", f"it has columns {pair[0]!r} and {pair[1]!r}", 3)
    elif pair := first_pair(columns, WRITTEN):
        yield Reading("generation", f"it has columns {pair[0]!r} and {pair[1]!r}", 3)
    elif pair := first_pair(columns, [(asked, found) for asked in ASKED for found in FOUND]):
        yield Reading("retrieval", f"it has columns {pair[0]!r} and {pair[1]!r}", 3)
    labels = label_candidates(columns)
    if labels and inputs(columns, labels):
        named = [name for name in labels if columns[name].named(LABELS)]
        certain = any(name.lower() in CERTAIN for name in named)
        written = f"column {(named or labels)[0]!r} holds few different values"
        yield Reading("classification", written, 3 if certain else 2 if named else 1)


def choose_task(columns: Columns, source: str, decide: Decide) -> TaskKind:
    """The task, from names and values of columns.

    Raises:
        DataError: no reading fits, or two fit equally and nobody is asked.
    """
    found = readings(columns)
    tied = [one for one in found if one.standing == found[0].standing]
    reason = f"{source}: {why_unlabelled(columns)}"
    if len(tied) > 1:
        ways = " and ".join(f"{one.task} ({one.reason})" for one in tied)
        reason = f"{source}: can be read as {ways}"
    allowed: tuple[TaskKind, ...] = ("classification", "generation", "chat", "preference", "retrieval")
    question = Question(
        "task",
        f"Task ({found[0].task}: {found[0].reason})" if found else "Task",
        tuple(one.task for one in tied) or allowed,
        proposal=tied[0].task if len(tied) == 1 else None,
        reason=reason,
        others=allowed,
    )
    answer = decide(question)
    for task in allowed:
        if answer == task:
            return task
    raise DataError(f"--task {answer}{nearest(answer, allowed)}")


def conversations(columns: Columns) -> list[str]:
    """Columns of messages, the one with the usual name first."""
    found = [name for name, column in columns.items() if column.kind == "messages"]
    return sorted(found, key=lambda name: name != MESSAGES)


def first_pair(columns: Columns, pairs: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
    """The first pair of names that both are columns with values, whatever their case."""
    known = {
        name.lower(): name for name, column in columns.items() if column.kind not in ("empty", "container")
    }
    for one, other in pairs:
        if one in known and other in known:
            return known[one], known[other]
    return None


def label_candidates(columns: Columns) -> list[str]:
    """Columns that may be one of labels: few values, all rows have one; not the rows' owner, nor an input."""
    return [
        name
        for name, column in columns.items()
        if column.kind == "category"
        and not column.missing
        and not (column.named(OWNERS) and not column.named(LABELS))
        and name.lower() not in TEXTS
    ]


def no_label(column: Column) -> str | None:
    """Why a column is none of labels, as a sentence; None where it may be one."""
    name = f"column {column.name!r}"
    if column.missing:
        return f"{name} {column.problem}; a label is needed in every row"
    if column.distinct == 1:
        return f"{name} has one value only; classification needs two or more"
    if column.distinct == column.rows:
        return f"{name} has another value in each of {column.rows} rows, so that it is no label"
    if column.kind == "number":
        return f"{name} holds numbers ({column.distinct} different ones), and no labels"
    if column.kind in ("date", "text", "identifier"):
        return f"{name} has {column.distinct} different values in {column.rows} rows, which are too many"
    return None


def why_unlabelled(columns: Columns) -> str:
    """Why no column is one of labels, as a sentence."""
    named = [column for column in columns.values() if column.named(LABELS)]
    reason = next(filter(None, map(no_label, named)), None)
    if reason is not None:
        return reason
    if labels := label_candidates(columns):
        return _no_text(columns, labels[0])
    kinds = ", ".join(f"{name} ({column.kind})" for name, column in list(columns.items())[:12])
    return f"no column looks like a label, and none like messages or a text to be written; columns: {kinds}"


def choose_label(columns: Columns, source: str, decide: Decide) -> str:
    """The column of labels: the one that is named so, or the only one with few different values.

    Raises:
        DataError: there is none, or several, and nobody is asked.
    """
    found = label_candidates(columns)
    named = [name for name in found if columns[name].named(LABELS)]
    exact = [name for name in named if name.lower() in LABELS]  # and not fine_label, say
    tied = exact or named or found
    reason = f"{source}: {len(tied)} columns may be the label"
    if not tied:
        reason = f"{source}: {why_unlabelled(columns)}"
    proposal = tied[0] if len(tied) == 1 else None
    offered, others = tuple(tied or columns), tuple(columns)
    answer = decide(Question("label", "Column of the label", offered, proposal, reason, others=others))
    return known_column(answer, columns, "label")


def inputs(columns: Columns, labels: Sequence[str]) -> list[str]:
    """Columns that may be a classifier's input: texts, or what is named like one."""
    return [
        name
        for name, column in columns.items()
        if name not in labels
        and not column.missing
        and (column.kind == "text" or (name.lower() in TEXTS and column.kind in ("identifier", "category")))
    ]


def choose_text(columns: Columns, label: str, source: str, decide: Decide) -> str:
    """The template of a classifier's input: a usual pair of columns, the only one of texts, or the one with a
    usual name.

    Raises:
        DataError: there is none, or several of equal standing, and nobody is asked.
    """
    found = inputs(columns, [label])
    if pair := first_pair({name: columns[name] for name in found}, PAIRS):
        proposal: str | None = "\n".join(f"{{{name}}}" for name in pair)
    else:
        named = [name for wanted in TEXTS for name in found if name.lower() == wanted]
        best = named[:1] or (found if len(found) == 1 else [])
        proposal = f"{{{best[0]}}}" if best else None
    reason = (
        f"{source}: {len(found)} columns hold texts" if found else f"{source}: {_no_text(columns, label)}"
    )
    offered = tuple(f"{{{name}}}" for name in found)
    return decide(Question("text", "Template of the input", offered, proposal, reason, free=True))


def _no_text(columns: Columns, label: str) -> str:
    for name, column in columns.items():
        if name != label and column.kind == "text" and column.problem:
            return f"column {name!r} {column.problem}; fill or leave out these rows"
    return "no column holds texts"


def choose_written(columns: Columns, source: str, decide: Decide) -> tuple[str, str]:
    """The templates of what is given, and of what is to be written behind it.

    Raises:
        DataError: no columns have usual names, and nobody is asked.
    """
    pair = first_pair(columns, (*INSTRUCTED, *WRITTEN))
    offered = tuple(f"{{{name}}}" for name, column in columns.items() if column.kind == "text")
    reason = f"{source}: no columns are named like a text to be given and one to be written"
    given = _given(pair, columns) if pair else None
    prompt = decide(Question("prompt", "Template of the prompt", offered, given, reason, free=True))
    target = f"{{{pair[1]}}}" if pair else None
    return prompt, decide(Question("target", "Template of the target", offered, target, reason, free=True))


def _given(pair: tuple[str, str], columns: Columns) -> str:
    """The prompt of a usual pair, behind the context that every row has."""
    for name, column in columns.items():
        if name.lower() in CONTEXTS and name not in pair and column.kind == "text" and not column.missing:
            return f"{{{name}}}\n{{{pair[0]}}}"
    return f"{{{pair[0]}}}"


def choose_found(columns: Columns, source: str, decide: Decide) -> tuple[str, str]:
    """The templates of questions and of the documents that answer them.

    Raises:
        DataError: no columns have usual names, and nobody is asked.
    """
    pair = first_pair(columns, [(asked, found) for asked in ASKED for found in (*FOUND, "answer")])
    offered = tuple(f"{{{name}}}" for name, column in columns.items() if column.kind == "text")
    reason = f"{source}: no columns are named like a question and a document"
    one, other = (f"{{{name}}}" for name in pair) if pair else (None, None)
    prompt = decide(Question("prompt", "Template of the question", offered, one, reason, free=True))
    return prompt, decide(Question("target", "Template of the document", offered, other, reason, free=True))


def owner_candidates(columns: Columns, used: Sequence[str]) -> list[str]:
    """Columns that may say whose a row is, by name and values; those that the task uses are none."""
    return [
        name
        for name, column in columns.items()
        if column.named(OWNERS)
        and name not in used
        and not column.missing
        and column.kind in ("category", "identifier", "text", "number")
        and (column.kind != "number" or column.integral)
        and 2 <= column.distinct <= column.rows / LEAST_OF_A_CLIENT
    ]


def choose_client(columns: Columns, used: Sequence[str], source: str, decide: Decide) -> str | None:
    """The column that says whose a row is; None: rows are assigned to clients at random.

    Raises:
        DataError: several columns may be that, and nobody is asked.
    """
    found = owner_candidates(columns, used)
    proposal = found[0] if len(found) == 1 else None if found else NONE
    reason = f"{source}: {len(found)} columns may say whose a row is"
    text = "Column that says whose a row is (none: rows are assigned to clients at random)"
    answer = decide(Question("client", text, (*found, NONE), proposal, reason, others=tuple(columns)))
    return None if answer == NONE else known_column(answer, columns, "client")


def known_column(name: str, columns: Columns, option: str) -> str:
    """The name of a column that there is.

    Raises:
        DataError: names those that there are.
    """
    if name not in columns:
        raise DataError(f"--{option} {name}: no such column{nearest(name, list(columns))}")
    return name
