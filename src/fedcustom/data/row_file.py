"""Rows and examples that stay on disk: of files with more rows than should lie in memory as objects."""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from ..core.errors import DataError
from .cells import Row
from .conversations import Message
from .examples import Example
from .files import parsed_line
from .templates import Field

LARGE_FILE = 8 * 2**20
"""Bytes of a JSONL file from which on its rows stay on disk. An object for each takes ten times as much."""


class JsonLinesFile:
    """The rows of a JSONL file, read anew each time; memory holds their columns alone.

    Raises:
        DataError: a line is not a JSON object, or the file is not UTF-8 or has no row; names the line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: dict[str, None] = {}
        for row in self._rows():
            if not row.keys() <= self.columns.keys():
                self.columns |= dict.fromkeys(row)
        if not self.columns:
            raise DataError(f"{path}: holds no row")

    def __iter__(self) -> Iterator[Row]:
        """Rows that all have the same columns; where an object lacks one, the value is None."""
        for row in self._rows():
            yield row if len(row) == len(self.columns) else Row(self._whole(row), row.place)

    def _whole(self, row: Row) -> dict[str, Any]:
        return {name: row.get(name) for name in self.columns}

    def _rows(self) -> Iterator[Row]:
        with self.path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield parsed_line(line, self.path, number)


class ExampleFile(Sequence[Example]):
    """Examples in a temporary file, of which memory holds the places. It goes with the object."""

    def __init__(self, examples: Iterable[Example]) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._ends = array("q", [0])
        self.labels = array("i")
        end = 0
        for example in examples:
            content = _packed(example)
            end += self._file.write(content)
            self._ends.append(end)
            self.labels.append(example.label)
        self._file.flush()

    def __len__(self) -> int:
        return len(self.labels)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        start, end = self._ends[place], self._ends[place + 1]
        return _unpacked(os.pread(self._file.fileno(), end - start, start))


def _packed(example: Example) -> bytes:
    fields = [(field.name, field.start, field.end) for field in example.fields]
    messages = [(message.role, message.content) for message in example.messages]
    parts = [example.text, example.label, example.target, example.references, fields, messages]
    return json.dumps([*parts, example.where, example.options, example.rejected]).encode()


def _unpacked(content: bytes) -> Example:
    text, label, target, references, fields, messages, where, options, rejected = json.loads(content)
    return Example(
        text,
        label,
        target,
        tuple(references),
        tuple(Field(*field) for field in fields),
        tuple(Message(*message) for message in messages),
        where,
        tuple(options),
        rejected,
    )
