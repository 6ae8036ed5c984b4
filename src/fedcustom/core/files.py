"""Atomic files: written whole or not at all.

A file or folder is prepared in a folder beside it, ``.<name>.<8 characters>.new``, which its writer locks. A
writer that is killed leaves that folder behind; the next write into the same place removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from .errors import RunError
from .tensors import Tensors


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: a reader sees the old file or the new one, whatever happens meanwhile."""
    _write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a binary file atomically."""
    _write(path, lambda temporary: temporary.write_bytes(content))


def write_secret(path: Path, content: bytes) -> None:
    """Write a binary file atomically that only its owner can read (mode 600), at no moment anybody else."""

    def fill(temporary: Path) -> None:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(content)

    _write(path, fill)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically. NaN and infinities are refused: other readers would not take them."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write named tensors atomically, in safetensors form, with ``metadata`` in the file's header."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _write(path, lambda temporary: safetensors.torch.save_file(contiguous, temporary, metadata))


def read_tensors(path: Path) -> Tensors:
    """Named tensors of a safetensors file.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        return dict(safetensors.torch.load_file(path))
    except (SafetensorError, FileNotFoundError) as error:
        raise RunError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, FileNotFoundError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from None


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Fill a fresh folder and put it in the place of ``path``, whole or not at all. In a folder that only its
    owner can open it is such a folder too.
    """
    with filled_beside(path, fill) as fresh:
        shutil.rmtree(path, ignore_errors=True)
        fresh.rename(path)
    _flush(path.parent)


@contextlib.contextmanager
def filled_beside(path: Path, fill: Callable[[Path], None]) -> Iterator[Path]:
    """A fresh folder beside ``path``, filled and brought to the disk; removed afterwards unless it was
    renamed.
    """
    with _preparing(path) as fresh:
        fresh.chmod(0o700 | (path.parent.stat().st_mode & 0o055))
        with _system_errors():
            fill(fresh)
        for file in fresh.rglob("*"):
            if file.is_file():
                _flush(file)
        yield fresh


@contextlib.contextmanager
def held(path: Path) -> Iterator[bool]:
    """Hold a file for this process alone, with its number in it; gives whether that was possible. The system
    lets go of it however the process ends. A file system without locks holds nothing back.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield True
        finally:
            file.truncate(0)


def holder(path: Path) -> int | None:
    """The process that holds a file (:func:`held`), if one does."""
    with contextlib.suppress(OSError), path.open("r+", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            number = file.read()
            return int(number) if number.isdigit() else None
    return None


def _write(path: Path, fill: Callable[[Path], Any]) -> None:
    with _preparing(path) as folder:
        temporary = folder / path.name
        with _system_errors():
            fill(temporary)
        _flush(temporary)
        temporary.replace(path)
    _flush(path.parent)


# --- temporary folders ---

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.new")
"""Name of a folder in which a file or folder is prepared."""

SWEEP_SHARE = 0.05
"""Share of the time that may be spent on looking for abandoned folders, where a folder has many entries."""

_next_sweep: dict[Path, float] = {}


@contextlib.contextmanager
def _preparing(path: Path) -> Iterator[Path]:
    """A fresh, locked folder beside ``path``, removed afterwards unless it was renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path.parent)
    fresh, lock = _locked_folder(path)
    try:
        yield fresh
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        os.close(lock)


def _locked_folder(path: Path) -> tuple[Path, int]:
    """A fresh folder beside ``path``, and the descriptor that holds its lock until it is closed, or until the
    process ends.
    """
    while True:
        fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
        fresh.mkdir(mode=0o700)
        # Another process may take the folder for an abandoned one before it is locked; then another is made.
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(fresh, os.O_RDONLY | os.O_DIRECTORY)
            if _lock(lock) is not False and fresh.exists():
                return fresh, lock
            os.close(lock)


def _lock(descriptor: int) -> bool | None:
    """Lock an open file or folder; False if another holds it, None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def remove_abandoned(parent: Path) -> None:
    """Remove what killed writers left in a folder: what has the name of a temporary folder, and no lock."""
    _next_sweep.pop(parent, None)
    _remove_abandoned(parent)


def _remove_abandoned(parent: Path) -> None:
    """The same, where it has not been looked for just before."""
    began = time.monotonic()
    if began < _next_sweep.get(parent, 0.0):
        return
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if TEMPORARY.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                with contextlib.suppress(OSError):  # removed meanwhile, or not ours to open
                    _remove_unlocked(Path(entry.path))
    if len(_next_sweep) > 1000:
        _next_sweep.clear()
    now = time.monotonic()
    _next_sweep[parent] = now + (now - began) / SWEEP_SHARE


def _remove_unlocked(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if _lock(descriptor):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _system_errors() -> Iterator[None]:
    """Raise a full disk as the ``OSError`` it is, where a library wraps it in an error of its own."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        found = re.search(r"os error (\d+)|Os \{ code: (\d+)", str(error))
        if found is None:
            raise
        code = int(found[1] or found[2])
        raise OSError(code, os.strerror(code)) from error


def _flush(path: Path) -> None:
    """Bring what was written to the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
