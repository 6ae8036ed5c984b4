"""Federated data of a run, built from the recipe's data and client settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from ..core.errors import DataError, nearest
from . import row_file
from .cells import Row, cell_text
from .conversations import with_conversation_columns
from .examples import ClientData, Example, FederatedData, LearningTask, columns, label_names, make_examples
from .files import ENDINGS, first_rows
from .many_clients import ManyClients, NumberedNames, sorted_members
from .partition import compact_partition, natural_partition, partition_examples
from .public import public_examples, read_public, refuse_overlap, set_aside, without_overlap
from .settings import ClientSettings, DataSettings, PublicSettings
from .sources import BUILTIN, local_file, read_rows, require_columns

T = TypeVar("T")

FIRST_ROWS = 100
"""Rows of a file that are looked at before anything is loaded."""


def build_data(
    data: DataSettings, clients: ClientSettings, seed: int, public: PublicSettings | None = None
) -> FederatedData:
    """Read, template, partition and split. The same settings and seed give the same data.

    Raises:
        DataError: see :mod:`fedcustom.data.sources` and :mod:`fedcustom.data.partition`.
    """
    data, clients = with_builtin_columns(data, clients)
    if (many := _many_clients(data, clients, seed, public or PublicSettings())) is not None:
        return many
    rows = draw(read_rows(data, data.train), data.limit, [seed, 1])
    data = with_conversation_columns(data, list(rows[0]))
    column = clients.column if clients.partition == "natural" else None
    if clients.partition == "natural" and column is None:
        raise DataError(
            f"clients.column: name the column that holds the client{nearest('client', list(rows[0]))}; "
            "or set clients.partition to iid, dirichlet, quantity or pathological"
        )
    where = f"{data.source}, {data.train}"
    require_columns(rows, [*columns(data, scoring=False), *([column] if column else [])], where)
    labels = label_names(rows, data.label, where) if data.task == "classification" else ()
    if data.task == "classification" and len(labels) < 2:
        raise DataError(
            f"{data.source}: column {data.label!r} has one value only; classification needs two or more"
        )
    public = public or PublicSettings()
    private, shared = set_aside(len(rows), public.fraction, [seed, 6])
    public_set = public_examples([rows[i] for i in shared], public, data, where)
    rows = [rows[i] for i in private]
    examples = make_examples(rows, data, labels, scoring=False, where=where)

    members = (
        natural_partition(_client_names(rows, column, where))
        if column
        else _numbered(partition_examples([max(e.label, 0) for e in examples], clients, seed))
    )
    test_rows = draw(read_rows(data, data.test), data.test_limit, [seed, 2]) if data.test else []
    test = _scoring_examples(test_rows, data, labels, data.test)
    development = _scoring_examples(
        read_rows(data, data.development) if data.development else [], data, labels, data.development
    )

    # A test split that names its clients gives each of them its own test part; otherwise it comes out of
    # their data.
    own_tests: dict[str, list[Example]] = {}
    if column and test_rows and column in test_rows[0]:
        names = _client_names(test_rows, column, f"{data.source}, {data.test}")
        own_tests = {name: [test[i] for i in own] for name, own in natural_partition(names).items()}
    split = {}
    for number, (name, positions) in enumerate(members.items()):
        chosen = [examples[i] for i in draw(positions, clients.limit, [seed, 3, number])]
        split[name] = split_client(name, chosen, own_tests.get(name), data, clients, [seed, 4, number])
    development = development or [e for client in split.values() for e in client.development]
    scored = test or [e for client in split.values() for e in client.test]
    if public.source is not None:
        public_set = read_public(public, data)
        refuse_overlap(public_set, [*scored, *development], public.source)
    return FederatedData(
        task=LearningTask.of(data, labels),
        clients=split,
        development=development,
        test=scored,
        test_is_pooled=not test,
        public=draw(without_overlap(public_set, [*scored, *development]), public.limit, [seed, 7]),
    )


def _many_clients(
    data: DataSettings, clients: ClientSettings, seed: int, public: PublicSettings
) -> FederatedData | None:
    """The same data for a large JSONL file (:data:`~.row_file.LARGE_FILE`): rows stay on disk, and a client
    is made when it is asked for. None for other files and recipes: development and test rows have to be
    splits of their own (``clients.test_fraction`` 0), and labels must not shape the partition.
    """
    path = local_file(data, data.train)
    if path is None or path.suffix != ".jsonl" or path.stat().st_size < row_file.LARGE_FILE:
        return None
    plain = data.task in ("classification", "generation") and data.limit is None and clients.limit is None
    alone = public.fraction == 0 and public.source is None
    apart = bool(data.test and data.development) and clients.test_fraction == 0
    if not (plain and apart and alone) or clients.partition not in ("iid", "quantity", "natural"):
        return None
    column, where = clients.column if clients.partition == "natural" else None, f"{data.source}, {data.train}"
    file = row_file.JsonLinesFile(path)
    if not {*columns(data, scoring=False), *filter(None, [column])} <= file.columns.keys():
        return None  # which says what is missing
    test_rows = draw(read_rows(data, data.test or ""), data.test_limit, [seed, 2])
    if clients.partition == "natural" and (column is None or column in test_rows[0]):
        return None
    labels = label_names(file, data.label, where) if data.task == "classification" else ()
    if data.task == "classification" and len(labels) < 2:
        return None
    examples = row_file.ExampleFile(
        example for row in file for example in make_examples([row], data, labels, scoring=False, where=where)
    )
    names: Sequence[str]
    if column is None:
        members = compact_partition(len(examples), clients, seed)
        names = NumberedNames(clients.count)
    else:
        try:
            names, members = sorted_members(_client_name(row, column, where) for row in file)
        except ValueError:
            return None

    def make(name: str, number: int, own: list[Example]) -> ClientData:
        return split_client(name, own, [], data, clients, [seed, 4, number])

    development_rows = read_rows(data, data.development or "")
    return FederatedData(
        task=LearningTask.of(data, labels),
        clients=ManyClients(names, members, examples, make),
        development=_scoring_examples(development_rows, data, labels, data.development),
        test=_scoring_examples(test_rows, data, labels, data.test),
        test_is_pooled=False,
    )


def check_first_rows(data: DataSettings, clients: ClientSettings) -> None:
    """Refuse columns that do not exist or hold no plain values, from the first rows of local files, before
    anything is loaded. Other sources, and files that are missing, are left to :func:`build_data`.

    Raises:
        DataError: names file, line and column, and what to use.
    """
    owner = [clients.column] if clients.partition == "natural" and clients.column else []
    for split in filter(None, (data.train, data.development, data.test)):
        scoring = split != data.train
        path = local_file(data, split)
        if path is None:
            continue
        where, rows = str(path), first_rows(path, FIRST_ROWS)
        data = with_conversation_columns(data, list(rows[0]) if rows else [])
        wanted = [*columns(data, scoring=scoring), *([] if scoring else owner)]
        in_all = ENDINGS[path.suffix] != "json" or len(rows) < FIRST_ROWS  # later objects may have more
        if rows and in_all:
            require_columns(rows, wanted, where)
        plain = wanted
        if data.task != "classification":
            make_examples(rows, data, (), scoring=scoring, where=where)
            plain = [] if scoring else owner
        for row in rows:
            for name in plain:
                if isinstance(row.get(name), list | dict | bytes):
                    cell_text(row, name, f"{where}, {row.place}")


def with_builtin_columns(data: DataSettings, clients: ClientSettings) -> tuple[DataSettings, ClientSettings]:
    """For the built-in data, the client column is known and need not be named."""
    if data.source == BUILTIN and clients.partition == "natural" and clients.column is None:
        clients = clients.model_copy(update={"column": "package"})
    return data, clients


def _scoring_examples(
    rows: list[Row], data: DataSettings, labels: Sequence[str], split: str | None
) -> list[Example]:
    if not rows:
        return []
    where = f"{data.source}, {split}"
    require_columns(rows, columns(data, scoring=True), where)
    return make_examples(rows, data, labels, scoring=True, where=where)


def split_client(
    name: str,
    examples: list[Example],
    own_test: list[Example] | None,
    data: DataSettings,
    clients: ClientSettings,
    seed: list[int],
) -> ClientData:
    """Cut one client's examples into train, development and test; each part has one at least where three
    exist.
    """
    order = np.random.default_rng(seed).permutation(len(examples)).tolist()

    def size(fraction: float) -> int:
        return max(1, int(fraction * len(examples))) if fraction > 0 and len(examples) >= 3 else 0

    developments = 0 if data.development else size(clients.development_fraction)
    tests = 0 if own_test is not None else size(clients.test_fraction)
    picked = [examples[i] for i in order]
    train = picked[developments + tests :]
    if not train:
        raise DataError(f"client {name!r} has no examples to train on")
    test = own_test if own_test is not None else picked[developments : developments + tests]
    return ClientData(name, train=train, development=picked[:developments], test=test)


def _client_names(rows: Sequence[Row], column: str, where: str) -> list[str]:
    return [_client_name(row, column, where) for row in rows]


def _client_name(row: Row, column: str, where: str) -> str:
    here = f"{where}, {row.place}"
    try:
        name = cell_text(row, column, here)
    except DataError as error:
        raise DataError(f"{error}; it names no client") from None
    if not name.strip():
        raise DataError(f"{here}: column {column!r} is blank; it names no client")
    return name


def _numbered(parts: list[list[int]]) -> dict[str, list[int]]:
    width = len(str(len(parts) - 1))
    return {f"client-{number:0{width}d}": part for number, part in enumerate(parts)}


def draw(items: list[T], limit: int | None, seed: list[int]) -> list[T]:
    """At most ``limit`` of the items, drawn without replacement, in their old order."""
    if limit is None or limit >= len(items):
        return items
    chosen = np.random.default_rng(seed).permutation(len(items))[:limit]
    return [items[i] for i in sorted(chosen.tolist())]
