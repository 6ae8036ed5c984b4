"""The cache folder: what is computed from public data and kept between runs. No client's data are in it.

Its files are named by the digest of what they were computed from, so that nothing stale is read.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

PARTS = ("docstrings", "models", "precision")
"""The folders in it, each of one kind of content. Nothing else in the cache folder is ever removed."""


def cache_folder() -> Path:
    """``$FEDCUSTOM_CACHE``, else ``fedcustom`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FEDCUSTOM_CACHE") or Path(shared, "fedcustom"))


def private(folder: Path) -> Path:
    """The folder, made if need be, with permissions 0700.

    Raises:
        OSError: it cannot be made.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    return folder


@dataclass(frozen=True, slots=True)
class CacheSize:
    """How many files the cache folder holds, and their bytes."""

    files: int
    bytes: int


def cache_size() -> CacheSize:
    """What is in the cache folder's parts."""
    sizes = [path.stat().st_size for part in _parts() for path in part.rglob("*") if path.is_file()]
    return CacheSize(len(sizes), sum(sizes))


def clear_cache() -> CacheSize:
    """Remove the cache folder's parts; returns what they held.

    Raises:
        OSError: a file cannot be removed.
    """
    found = cache_size()
    for part in _parts():
        shutil.rmtree(part)
    return found


def _parts() -> list[Path]:
    folders = [cache_folder() / part for part in PARTS]
    return [folder for folder in folders if folder.is_dir() and not folder.is_symlink()]
