"""Rows from files, folders, hub data sets and the built-in source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import DataError, nearest
from .cells import Row, class_name
from .files import ENDINGS, read_file
from .settings import DataSettings

BUILTIN = "builtin:docstrings"


def read_rows(settings: DataSettings, split: str) -> list[Row]:
    """All rows of one split.

    Raises:
        DataError: the source or split does not exist, cannot be read or is empty; malformed rows are named
            by file and line.
    """
    if settings.source.startswith("builtin:"):
        return _builtin_rows(settings, split)
    path = Path(settings.source).expanduser()
    if path.is_file() or is_saved(path):
        rows = _read(path if split == settings.train else _sibling(path.parent, split))
    elif path.is_dir() and not (path / "dataset_dict.json").exists():
        rows = _read(_sibling(path, split))
    elif path.is_dir():
        rows = _saved_split(path, split)
    else:
        rows = _hub_rows(settings, split)
    if not rows:
        raise DataError(f"{settings.source}: split {split!r} is empty")
    return rows


def local_file(settings: DataSettings, split: str) -> Path | None:
    """The file in which a split's rows are; None where the source is none, or has no such file."""
    path = Path(settings.source).expanduser()
    if settings.source.startswith("builtin:") or not path.exists():
        return None
    if path.is_file() and split == settings.train:
        return path if path.suffix in ENDINGS else None
    folder = path if path.is_dir() else path.parent
    found = [folder / split, *(folder / f"{split}{ending}" for ending in ENDINGS)]
    return next((one for one in found if one.is_file() and one.suffix in ENDINGS), None)


def is_saved(folder: Path) -> bool:
    """Whether a folder holds one data set that ``datasets`` saved with ``save_to_disk``."""
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def _read(path: Path) -> list[Row]:
    return _saved_rows(path) if is_saved(path) else read_file(path)


def _sibling(folder: Path, split: str) -> Path:
    """The file of a split in a folder: ``split`` itself, or ``split`` with a known ending; or a data set that
    was saved under that name.
    """
    candidates = [folder / split, *(folder / f"{split}{ending}" for ending in ENDINGS)]
    for candidate in candidates:
        if candidate.is_file() or is_saved(candidate):
            return candidate
    present = sorted(entry.stem for entry in folder.iterdir() if entry.suffix in ENDINGS or is_saved(entry))
    raise DataError(f"{folder}: no file for split {split!r}{nearest(split, present)}")


def _saved_split(folder: Path, split: str) -> list[Row]:
    """Rows of one split of a ``DatasetDict`` that was saved with ``save_to_disk``."""
    import json

    try:
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{folder / 'dataset_dict.json'}: names no splits") from None
    if split not in splits:
        raise DataError(f"{folder}: no split {split!r}{nearest(split, sorted(splits))}")
    return _saved_rows(folder / split)


def _saved_rows(folder: Path) -> list[Row]:
    """Rows of one data set that was saved with ``save_to_disk``; its files are mapped, not copied."""
    import datasets

    try:
        return _dataset_rows(datasets.load_from_disk(str(folder)), str(folder))
    except (DataError, PermissionError):
        raise
    except Exception as error:  # a damaged folder raises many kinds of error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{folder}: cannot be read as a saved data set: {reason}") from error


def _hub_rows(settings: DataSettings, split: str) -> list[Row]:
    """Rows of a data set on the hub."""
    import datasets

    datasets.disable_progress_bars()
    if settings.source.startswith((".", "/", "~")) or Path(settings.source).suffix in ENDINGS:
        raise DataError(f"{settings.source}: no such file or folder")
    try:
        loaded = datasets.load_dataset(settings.source, settings.subset, split=split)
    except Exception as error:  # network, authentication, missing split: each library has its own kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{settings.source}: no file or folder here, and the hub does not give it: {reason}"
        ) from error
    return _dataset_rows(loaded, f"{settings.source}, {split}")


def _dataset_rows(loaded: Any, where: str) -> list[Row]:
    """Rows of a ``datasets`` data set, with the names of numbered classes in place of their numbers."""
    import datasets

    classes = {
        name: list(feature.names)
        for name, feature in loaded.features.items()
        if isinstance(feature, datasets.ClassLabel) and feature.names
    }
    rows = []
    for number, values in enumerate(loaded.with_format(None).to_list(), start=1):
        row = Row(values, f"row {number}")
        for name, names in classes.items():
            row[name] = class_name(row[name], names, f"{where}, row {number}: column {name!r}")
        rows.append(row)
    return rows


def _builtin_rows(settings: DataSettings, split: str) -> list[Row]:
    if settings.source != BUILTIN:
        raise DataError(f"data.source: no built-in data {settings.source!r}; allowed: {BUILTIN}")
    if split != settings.train:
        raise DataError(f"{BUILTIN} has no split {split!r}: leave data.development and data.test unset")
    if settings.task == "retrieval":
        raise DataError(f"{BUILTIN}: holds no documents to be asked; name another data.source")
    from .docstrings import docstring_rows

    found = docstring_rows("classification" if settings.task == "classification" else "generation")
    return [Row(row, f"row {number}") for number, row in enumerate(found, start=1)]


def require_columns(rows: Sequence[Mapping[str, Any]], wanted: Sequence[str], where: str) -> None:
    """Refuse rows that lack a column.

    Raises:
        DataError: names the first missing column, those that exist and the nearest of them.
    """
    present = list(rows[0])
    for name in wanted:
        if name not in present:
            raise DataError(f"{where}: no column {name!r}{nearest(name, present)}")
