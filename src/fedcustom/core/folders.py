"""Folders that a user names for results: filled whole or not at all, as far as the file system allows."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from .errors import RunError
from .files import filled_beside, remove_abandoned, write_folder

OF_THE_SYSTEM = ("lost+found",)
"""What the root of a fresh file system may hold, and is not the user's."""


def fill_folder(path: Path, fill: Callable[[Path], None], *, last: Sequence[str] = ()) -> None:
    """Fill a folder that does not exist or is empty; a link to such a folder, ``.`` and a mount point too.

    A folder that does not exist appears whole or not at all. One that exists stays the folder that it is,
    with its owner and permissions, since a mount point or a working directory cannot be replaced: a folder
    inside it is filled, then its entries are moved up, those named in ``last`` at the end, so that a folder
    that lacks them is not done.

    Raises:
        RunError: it holds something, or is no folder.
    """
    place = usable_folder(path)
    if not place.exists():
        write_folder(place, fill)
        return
    with filled_beside(place / (place.name or "root"), fill) as fresh:
        names = sorted((entry.name for entry in fresh.iterdir()), key=lambda name: (name in last, name))
        moved: list[Path] = []
        try:
            for name in names:
                (fresh / name).rename(place / name)
                moved.append(place / name)
        except BaseException:
            for entry in moved:
                _remove(entry)
            raise


def usable_folder(path: Path) -> Path:
    """The folder behind a path, absolute and without links, if it does not exist or is empty.

    Raises:
        RunError: it holds something, or is no folder.
    """
    try:
        place = path.resolve()
    except (RuntimeError, OSError) as error:  # links in a circle
        raise RunError(f"{path}: cannot be a folder: {error}") from None
    if not place.exists():
        return place
    if not place.is_dir():
        raise RunError(f"{path}: exists already and is no folder; name a new or an empty folder")
    remove_abandoned(place)
    if held := sorted(entry.name for entry in place.iterdir() if entry.name not in OF_THE_SYSTEM):
        raise RunError(
            f"{path}: exists already and is not empty (it holds {held[0]!r}); name a new or an empty folder"
        )
    return place


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            entry.unlink()
