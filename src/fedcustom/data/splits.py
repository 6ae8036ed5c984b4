"""The splits that a source of data has, by name, without reading their rows."""

from __future__ import annotations

import json
from pathlib import Path

from ..core.errors import DataError, nearest
from .files import ENDINGS
from .sources import is_saved

DOCUMENTS = (".txt", ".md", ".rst", ".html", ".htm", ".pdf", ".docx", ".doc")
"""Endings of files that hold a document, and no rows."""

TRAIN = ("train", "training")
DEVELOPMENT = ("development", "dev", "validation", "valid", "val")
TEST = ("test", "testing")


def find_splits(source: str, subset: str | None = None) -> list[str]:
    """Names of a source's splits. A single file, a single saved data set and what is built in have one,
    ``train``.

    Args:
        source: as ``data.source``: a file, a folder, a hub id, or something built in.
        subset: the configuration of a hub data set that has several.

    Raises:
        DataError: there is nothing by that name, or a folder holds no rows.
    """
    path = Path(source).expanduser()
    if source.startswith("builtin:") or path.is_file() or is_saved(path):
        return [TRAIN[0]]
    if not path.is_dir():
        return _hub_splits(source, subset)
    if (index := path / "dataset_dict.json").is_file():
        try:
            return list(json.loads(index.read_text(encoding="utf-8"))["splits"])
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{index}: names no splits") from None
    entries = list(path.iterdir())
    found = sorted({entry.stem for entry in entries if entry.suffix in ENDINGS or is_saved(entry)})
    if not found:
        documents = sum(entry.suffix.lower() in DOCUMENTS for entry in entries)
        what = f"holds {documents} documents and no rows" if documents else "holds no rows"
        raise DataError(
            f"{source}: {what}; write them to a file of rows, such as {{question, document}} for retrieval "
            f"or {{text, label}} for classification; allowed endings: {', '.join(ENDINGS)}"
        )
    return found


def training_split(splits: list[str], source: str) -> str:
    """The split to train on: the one that is named so, or the only one.

    Raises:
        DataError: there are several, and none is named so.
    """
    named = [name for name in TRAIN if name in splits]
    if named:
        return named[0]
    if len(splits) == 1:
        return splits[0]
    raise DataError(f"{source}: no split is named 'train'; name one by --train{nearest('train', splits)}")


def scoring_split(splits: list[str], names: tuple[str, ...]) -> str | None:
    """The first of the ``names`` that is a split."""
    return next((name for name in names if name in splits), None)


def _hub_splits(source: str, subset: str | None) -> list[str]:
    import datasets

    if source.startswith((".", "/", "~")) or Path(source).suffix in ENDINGS or source.count("/") > 1:
        raise DataError(f"{source}: no such file or folder")
    try:
        return list(datasets.get_dataset_split_names(source, subset))
    except Exception as error:  # network, authentication, several subsets: each library has its own kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{source}: no file or folder here, and the hub does not give it: {reason}"
        ) from error
