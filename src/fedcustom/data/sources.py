"""Rows from files, folders, hub data sets and the built-in source, through ``datasets``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.errors import DataError, nearest
from .settings import DataSettings

Row = dict[str, Any]

ENDINGS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
BUILTIN = "builtin:docstrings"


def read_rows(settings: DataSettings, split: str) -> list[Row]:
    """All rows of one split.

    Raises:
        DataError: the source or split does not exist, cannot be read or is empty; malformed JSON is named by
        file and
            line.
    """
    if settings.source.startswith("builtin:"):
        return _builtin_rows(settings, split)
    path = Path(settings.source).expanduser()
    if path.is_file():
        rows = read_file(path) if split == settings.train else read_file(_sibling(path.parent, split))
    elif path.is_dir() and not (path / "dataset_dict.json").exists():
        rows = read_file(_sibling(path, split))
    else:
        rows = _hub_rows(settings, split, saved=path.is_dir())
    if not rows:
        raise DataError(f"{settings.source}: split {split!r} is empty")
    return rows


def read_file(path: Path) -> list[Row]:
    """All rows of a JSONL, CSV or Parquet file.

    Raises:
        DataError: the file is missing, empty, unreadable or malformed.
    """
    kind = ENDINGS.get(path.suffix)
    if kind is None:
        raise DataError(f"{path}: unknown kind of file; allowed: {', '.join(ENDINGS)}")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        if kind == "json":
            return _json_rows(path)
        import datasets

        datasets.disable_progress_bars()
        loaded = (
            datasets.Dataset.from_csv(str(path))
            if kind == "csv"
            else datasets.Dataset.from_parquet(str(path))
        )
        rows: list[Row] = loaded.to_list()
        return rows
    except (DataError, PermissionError):
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except Exception as error:  # datasets raises many kinds of error for a malformed file
        reason = str(error.__cause__ or error).splitlines()[0]
        raise DataError(f"{path}: cannot be read as {path.suffix[1:].upper()}: {reason}") from error


def _json_rows(path: Path) -> list[Row]:
    """Rows of a JSON-lines file, or of a JSON file that holds one list of objects.

    ``datasets`` reads these too, but reports a malformed line without its number and refuses files whose rows
    differ in their optional fields.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json" and text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from None
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: not JSON: {error.msg} (column {error.colno})"
                ) from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number}: must be a JSON object, not {type(row).__name__}")
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def _sibling(folder: Path, split: str) -> Path:
    """The file of a split in a folder: ``split`` itself, or ``split`` with a known ending."""
    candidates = [folder / split, *(folder / f"{split}{ending}" for ending in ENDINGS)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    present = sorted(entry.stem for entry in folder.iterdir() if entry.suffix in ENDINGS)
    raise DataError(f"{folder}: no file for split {split!r}{nearest(split, present)}")


def _hub_rows(settings: DataSettings, split: str, *, saved: bool) -> list[Row]:
    """Rows of a data set on the hub, or of one that was saved to a folder with ``save_to_disk``."""
    import datasets

    datasets.disable_progress_bars()
    if not saved and (settings.source.startswith((".", "/", "~")) or Path(settings.source).suffix in ENDINGS):
        raise DataError(f"{settings.source}: no such file or folder")
    try:
        if saved:
            loaded = datasets.load_from_disk(settings.source)
            if split not in loaded:
                raise DataError(f"{settings.source}: no split {split!r}{nearest(split, sorted(loaded))}")
            loaded = loaded[split]
        else:
            loaded = datasets.load_dataset(settings.source, settings.subset, split=split)
    except DataError:
        raise
    except Exception as error:  # network, authentication, missing split: each library has its own kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{settings.source}: no file or folder here, and the hub does not give it: {reason}"
        ) from error
    for name, feature in loaded.features.items():
        if isinstance(feature, datasets.ClassLabel):  # show the label's name, not its number
            loaded = (
                loaded.cast_column(name, datasets.Value("string"))
                if not feature.names
                else loaded.map(
                    lambda row, name=name, feature=feature: {name: feature.int2str(row[name])},
                    features=datasets.Features({**loaded.features, name: datasets.Value("string")}),
                )
            )
    rows: list[Row] = loaded.to_list()
    return rows


def _builtin_rows(settings: DataSettings, split: str) -> list[Row]:
    if settings.source != BUILTIN:
        raise DataError(f"data.source: no built-in data {settings.source!r}; allowed: {BUILTIN}")
    if split != settings.train:
        raise DataError(f"{BUILTIN} has no split {split!r}: leave data.development and data.test unset")
    if settings.task == "retrieval":
        raise DataError(f"{BUILTIN}: holds no documents to be asked; name another data.source")
    from .docstrings import docstring_rows

    return list(docstring_rows(settings.task))


def require_columns(rows: Sequence[Row], wanted: Sequence[str], where: str) -> None:
    """Refuse rows that lack a column.

    Raises:
        DataError: names the first missing column, those that exist and the nearest of them.
    """
    present = list(rows[0])
    for name in wanted:
        if name not in present:
            raise DataError(f"{where}: no column {name!r}{nearest(name, present)}")
