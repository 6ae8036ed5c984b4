"""``fedcustom cache``: what is kept between runs, and its removal."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest

from fedcustom.data.docstrings import docstring_rows


def test_the_cache_is_shown_and_cleared(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FEDCUSTOM_CACHE", str(folder))
    assert command("cache").out == f"{folder}: 0 files, 0 bytes\n"
    rows = docstring_rows("classification", ["peft"])
    (file,) = (folder / "docstrings").iterdir()
    assert stat.S_IMODE((folder / "docstrings").stat().st_mode) == 0o700
    (folder / "mine.txt").write_text("not ours")
    size = f"{file.stat().st_size:,}"
    assert command("cache").out == f"{folder}: 1 files, {size} bytes\n"
    assert command("cache", "--clear").out == f"{folder}: 1 files, {size} bytes removed\n"
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    assert docstring_rows("classification", ["peft"]) == rows
