"""Rows of local files: JSONL, JSON, CSV and Parquet, read directly. No copy is kept anywhere."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import DataError
from .cells import Row, class_name

ENDINGS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}

LONGEST_FIELD = 2**31 - 1
"""Characters of a CSV field; the library's own limit of 131,072 is less than a long document."""


def read_file(path: Path) -> list[Row]:
    """All rows of a JSONL, JSON, CSV or Parquet file. Every cell of a CSV file is a text.

    Raises:
        DataError: the file is missing, unreadable or malformed; names the line and, where it is known, the
            column.
    """
    return _complete(path, _rows(path))


def first_rows(path: Path, count: int) -> list[Row]:
    """The first rows of a file, without reading the rest (of a ``.json`` file all is read).

    Raises:
        DataError: see :func:`read_file`.
    """
    return _complete(path, islice(_rows(path), count))


def _complete(path: Path, found: Iterator[Row]) -> list[Row]:
    """Rows that all have the same columns; where a JSON object lacks one, the value is None."""
    rows = list(found)
    if ENDINGS[path.suffix] == "json":
        names = dict.fromkeys(name for row in rows for name in row)
        rows = [Row(((name, row.get(name)) for name in names), row.place) for row in rows]
    return rows


def _rows(path: Path) -> Iterator[Row]:
    kind = ENDINGS.get(path.suffix)
    if kind is None:
        raise DataError(f"{path}: unknown kind of file; allowed: {', '.join(ENDINGS)}")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    read = {"json": _json_rows, "csv": _csv_rows, "parquet": _parquet_rows}[kind]
    try:
        yield from read(path)
    except UnicodeDecodeError:
        raise not_utf8(str(path), path.read_bytes()) from None


def not_utf8(name: str, content: bytes) -> DataError:
    """The error for a file that is not UTF-8, with the line and byte of the first fault (both from 1)."""
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return DataError(f"{name}: not UTF-8 text (line {line}, byte {error.start + 1} of the file)")
    return DataError(f"{name}: not UTF-8 text")


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader, begun = csv.reader(file, strict=True), 1
        names: list[str] | None = None
        try:
            for fields in reader:
                here, begun = begun, reader.line_num + 1
                if not fields:
                    continue  # a blank line holds no row
                if names is None:
                    names = fields
                    _refuse_twice(names, f"{path}, line {here}")
                elif len(fields) != len(names):
                    raise DataError(
                        f"{path}, line {here}: {len(fields)} fields, but the header names {len(names)} "
                        "columns; a field with a comma or a line break needs quotes"
                    )
                else:
                    yield Row(zip(names, fields, strict=True), f"line {here}")
        except csv.Error as error:
            raise DataError(f"{path}, line {begun}: not CSV: {error}") from None


def _refuse_twice(names: list[str], where: str) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1 and name]  # unnamed ones may repeat
    if twice:
        raise DataError(f"{where}: two columns are named {twice[0]!r}")


def _json_rows(path: Path) -> Iterator[Row]:
    """The objects of a JSON-lines file, or of a JSON file that holds one list of objects."""
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        if path.suffix == ".json":
            text = file.read()
            if text.lstrip().startswith("["):
                values = _parsed(text, f"{path}", lines=True)
                for number, value in enumerate(values, start=1):
                    yield _object(value, str(path), f"row {number}")
                return
            lines = iter(text.split("\n"))
        else:
            lines = iter(file)
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield parsed_line(line, path, number)


def parsed_line(line: str, path: Path, number: int) -> Row:
    """The row of one line of a JSONL file.

    Raises:
        DataError: it is no JSON object; names file and line.
    """
    place = f"line {number}"
    return _object(_parsed(line, f"{path}, {place}"), str(path), place)


def _parsed(text: str, where: str, *, lines: bool = False) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f", line {error.lineno}" if lines else ""
        raise DataError(f"{where}{at}: not JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # an endless number, or lists in lists without end
        raise DataError(f"{where}: not JSON: {str(error).splitlines()[0]}") from None


def _object(value: Any, path: str, place: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{path}, {place}: must be a JSON object, not {type(value).__name__}")
    return Row(value, place)


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _refuse_twice(names, str(path))
            classes, start = _class_names(file.schema_arrow.metadata), 0
            for batch in file.iter_batches():
                cells = [_values(column) for column in batch.columns]
                for offset in range(batch.num_rows):
                    place = f"row {start + offset + 1}"
                    row = Row(((name, cells[i][offset]) for i, name in enumerate(names)), place)
                    for name in classes.keys() & row.keys():
                        where = f"{path}, {place}: column {name!r}"
                        row[name] = class_name(row[name], classes[name], where)
                    yield row
                start += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        raise DataError(f"{path}: cannot be read as PARQUET: {str(error).splitlines()[0]}") from None


def _values(column: Any) -> list[Any]:
    """The values of an Arrow column; those of less than 64 bits keep their type, and so their digits."""
    import pyarrow

    values: list[Any] = column.to_pylist()
    narrow = {pyarrow.float32(): np.float32, pyarrow.float16(): np.float16}.get(column.type)
    return values if narrow is None else [None if value is None else narrow(value) for value in values]


def _class_names(metadata: dict[bytes, bytes] | None) -> dict[str, list[str]]:
    """The names of numbered classes by column, from what ``datasets`` writes into a Parquet file."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: list(feature["names"])
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}  # not written by datasets
