"""Atomic writers: what a killed one leaves is removed by the next, and a live one is left alone."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedcustom.core import files
from fedcustom.core.files import (
    write_bytes,
    write_folder,
    write_json,
    write_secret,
    write_tensors,
    write_text,
)

WRITERS: dict[str, Callable[[Path], None]] = {
    "text": lambda path: write_text(path, "a"),
    "bytes": lambda path: write_bytes(path, b"a"),
    "secret": lambda path: write_secret(path, b"a"),
    "JSON": lambda path: write_json(path, [1]),
    "tensors": lambda path: write_tensors(path, {"a": torch.ones(3)}),
    "folder": lambda path: write_folder(path, lambda folder: write_text(folder / "a.txt", "a")),
}


def killed(write: Callable[[Path], None], path: Path) -> None:
    """Have a process write, which is killed when the content is there, but not yet in its place."""
    child = os.fork()
    if child == 0:
        files._flush = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        write(path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("kind", WRITERS)
def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path: Path, kind: str) -> None:
    for other, write in WRITERS.items():  # each kind of writer removes what any left
        killed(WRITERS[kind], tmp_path / "killed")
        (left,) = (path for path in tmp_path.iterdir() if path.name.startswith("."))
        assert left.name.startswith(".killed.")
        assert list(left.iterdir()), "it was at work"
        files._next_sweep.clear()
        write(tmp_path / other)
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
        assert not (tmp_path / "killed").exists()
    assert {path.name for path in tmp_path.iterdir()} == set(WRITERS)


@pytest.mark.parametrize("other", WRITERS)
def test_a_live_writer_is_left_alone(tmp_path: Path, other: str) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def fill(folder: Path) -> None:
        (folder / "a.txt").write_text("whole")
        begun.set()
        assert go_on.wait(10.0)

    writer = threading.Thread(target=write_folder, args=(tmp_path / "slow", fill))
    writer.start()
    assert begun.wait(10.0)
    files._next_sweep.clear()
    WRITERS[other](tmp_path / "other")
    go_on.set()
    writer.join()
    assert (tmp_path / "slow" / "a.txt").read_text() == "whole"
    assert {path.name for path in tmp_path.iterdir()} == {"slow", "other"}


def test_only_temporary_folders_are_removed(tmp_path: Path) -> None:
    theirs = [".config", ".a.new", ".git", ".a.0123456.new", "a.01234567.new", ".a.0123456x.new"]
    for name in theirs:
        (tmp_path / name).mkdir()
    (tmp_path / ".b.01234567.new").write_text("a file, not a folder")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".c.01234567.new").symlink_to(tmp_path / "elsewhere")
    (tmp_path / ".d.01234567.new").mkdir()  # the one that has our name
    write_text(tmp_path / "a.txt", "a")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {*theirs, ".b.01234567.new", ".c.01234567.new", "elsewhere", "a.txt"}


def test_a_folder_with_many_entries_is_not_searched_at_each_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(files.time, "monotonic", lambda: now[0])
    (tmp_path / ".a.01234567.new").mkdir()
    monkeypatch.setattr(
        files, "_remove_unlocked", lambda _: now.__setitem__(0, now[0] + 1.0)
    )  # it took a second
    write_text(tmp_path / "a.txt", "a")
    assert now[0] == 101.0
    now[0] += 19.0
    write_text(tmp_path / "a.txt", "b")
    assert now[0] == 120.0, "at 5 % of the time, the next search comes after 20 seconds"
    now[0] += 1.5
    write_text(tmp_path / "a.txt", "c")
    assert now[0] == 122.5


def test_many_writers_of_one_file(tmp_path: Path) -> None:
    texts = [str(number) * 1000 for number in range(8)]

    def write(text: str) -> None:
        for _ in range(20):
            files._next_sweep.clear()
            write_text(tmp_path / "a.txt", text)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a.txt").read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_secret_is_for_its_owner_alone_whatever_the_mask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_secret(tmp_path / "key", b"first")
        write_secret(tmp_path / "key", b"second")
    finally:
        os.umask(before)
    assert (tmp_path / "key").read_bytes() == b"second"
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
