"""Folders that a user names are filled whole or not at all, whatever stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedcustom.core.errors import RunError
from fedcustom.core.folders import fill_folder, usable_folder


def fill(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "part").mkdir()
    (folder / "part" / "data").write_text("x")


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


FILLED = ["config.json", "part", "part/data"]


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    fill_folder(tmp_path / "a" / "b", fill)
    assert names(tmp_path / "a") == ["b", *(f"b/{name}" for name in FILLED)]


def test_an_empty_folder_stays_the_same_folder(tmp_path: Path) -> None:
    # A mount point cannot be replaced, and a shell would be left in a folder that is gone.
    target = tmp_path / "there"
    target.mkdir(mode=0o750)
    before = target.stat()
    fill_folder(target, fill)
    after = target.stat()
    assert names(target) == FILLED
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert names(tmp_path) == ["there", *(f"there/{name}" for name in FILLED)], "nothing beside it"


def test_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fill_folder(Path(), fill)
    assert sorted(os.listdir()) == ["config.json", "part"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_a_link(tmp_path: Path, exists: bool) -> None:
    if exists:
        (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    fill_folder(tmp_path / "link", fill)
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "real") == FILLED


def test_a_mount_point(tmp_path: Path) -> None:
    target = tmp_path / "mounted"
    target.mkdir()
    code = (
        "import pathlib, sys\nfrom fedcustom.core.folders import fill_folder\n"
        "place = pathlib.Path(sys.argv[1])\n"
        "(place / 'lost+found').mkdir()\n"
        "fill_folder(place, lambda folder: (folder / 'config.json').write_text('{}'))\n"
        "print(sorted(entry.name for entry in place.iterdir()))"
    )
    mount = f'mount -t tmpfs none {target} && exec {sys.executable} -c "$0" {target}'
    made = subprocess.run(["unshare", "-rm", "sh", "-c", mount, code], capture_output=True, text=True)
    if "unshare" in made.stderr or "mount:" in made.stderr:
        pytest.skip(f"no mounts here: {made.stderr.strip()}")
    assert made.stdout.strip() == "['config.json', 'lost+found']", made.stderr


@pytest.mark.parametrize("kind", ["file", "content", "hidden", "file link", "circle"])
def test_what_is_in_use_is_refused_and_left(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "there"
    if kind == "file":
        target.write_text("x")
    elif kind == "file link":
        (tmp_path / "file").write_text("x")
        target.symlink_to("file")
    elif kind == "circle":
        target.symlink_to("there")
    else:
        target.mkdir()
        (target / (".hidden" if kind == "hidden" else "data")).write_text("x")
    before = names(tmp_path)
    with pytest.raises(RunError, match=re.escape(str(target))) as error:
        fill_folder(target, fill)
    assert "\n" not in str(error.value)
    assert names(tmp_path) == before


@pytest.mark.parametrize("exists", [True, False])
def test_a_failure_leaves_nothing(tmp_path: Path, exists: bool) -> None:
    target = tmp_path / "there"
    if exists:
        target.mkdir()

    def fails(folder: Path) -> None:
        fill(folder)
        raise RunError("no")

    with pytest.raises(RunError, match="no"):
        fill_folder(target, fails)
    assert names(tmp_path) == (["there"] if exists else [])
    fill_folder(target, fill)
    assert names(target) == FILLED


def test_what_makes_a_folder_look_done_is_moved_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, moved = Path.rename, list[str]()

    def watched(self: Path, target: Path) -> Path:
        moved.append(target.name)
        if target.name == "config.json":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watched)
    with pytest.raises(OSError, match="No space"):
        fill_folder(tmp_path, fill, last=("config.json",))
    assert moved == ["part", "config.json"]
    assert names(tmp_path) == [], "what was moved is taken back"


def test_what_a_killed_writer_left_does_not_count(tmp_path: Path) -> None:
    left = tmp_path / f".{tmp_path.name}.0123abcd.new"
    left.mkdir()
    (left / "config.json").write_text("{}")
    assert usable_folder(tmp_path) == tmp_path.resolve()
    fill_folder(tmp_path, fill)
    assert names(tmp_path) == FILLED
