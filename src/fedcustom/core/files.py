"""Atomic files: written whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import tempfile
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


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically. NaN and infinities are refused: other readers would not take them."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors atomically, in safetensors form."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _write(path, lambda temporary: safetensors.torch.save_file(contiguous, temporary))


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
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        fresh.chmod(0o700 | (path.parent.stat().st_mode & 0o055))
        with _system_errors():
            fill(fresh)
        for file in fresh.rglob("*"):
            if file.is_file():
                _flush(file)
        shutil.rmtree(path, ignore_errors=True)
        fresh.rename(path)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    _flush(path.parent)


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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with _system_errors():
            fill(temporary)
        _flush(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush(path.parent)


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
