"""A run that is killed goes on to the same tensors and figures as one that is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import fedcustom
from fedcustom.core.errors import DataError, RunError
from fedcustom.core.files import held, write_folder, write_json, write_tensors, write_text
from fedcustom.core.tensors import equal
from fedcustom.federated.run_directory import Checkpoints, History
from fedcustom.recipe.recipe import load_recipe, to_toml
from helpers.runs import rows_of, tensors_of, without_seconds

# A command that runs a recipe and dies as by kill -9 when the n-th file of the run is about to be put in its
# place.
KILLED = """
import os, signal, sys
from pathlib import Path
import fedcustom.federated.run_directory, fedcustom.core.files
left = int(sys.argv[3])
def dying(original):
    def call(*arguments, **named):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **named)
    return call
fedcustom.core.files._flush = dying(fedcustom.core.files._flush)
fedcustom.federated.run_directory.History.append = dying(fedcustom.federated.run_directory.History.append)
import fedcustom
fedcustom.run(sys.argv[1], out=sys.argv[2], resume=True)
"""


def variants(small: dict[str, Any]) -> dict[str, dict[str, Any]]:
    dropout = {**small["training"], "dropout": True}
    return {
        "federated": {**small, "training": dropout, "aggregation": {"server_optimizer": "fedadam"}},
        "centralised": {**small, "training": dropout, "baseline": "centralised"},
        "local": {
            **small,
            "training": dropout,
            "baseline": "local",
            "rounds": {"count": 3, "checkpoint_every": 2},
        },
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("variant", ["federated", "centralised", "local"])
def test_killed_at_any_moment(small: dict[str, Any], tmp_path: Path, variant: str) -> None:
    recipe = load_recipe(variants(small)[variant])
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(recipe))
    whole = fedcustom.run(path, out=tmp_path / "whole")
    # Each start dies a little later than the last one, and goes on from what the last one left.
    for moment in (2, 7, 12, 16, 23) if variant == "federated" else (2, 16):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(path), str(tmp_path / "killed"), str(moment)],
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
    killed = fedcustom.run(path, out=tmp_path / "killed", resume=True)
    assert list(map(without_seconds, rows_of(killed.directory))) == list(
        map(without_seconds, rows_of(whole.directory))
    )
    unlike = ("seconds", "peak_memory_bytes")
    assert {k: v for k, v in killed.summary.items() if k not in unlike} == {
        k: v for k, v in whole.summary.items() if k not in unlike
    }
    last = recipe.rounds.count
    ours, theirs = (Checkpoints(run.directory / "checkpoints").load(last) for run in (killed, whole))
    assert equal(ours.state.tensors, theirs.state.tensors)
    assert equal(ours.state.server, theirs.state.server)
    assert ours.memories == theirs.memories
    if variant != "local":
        assert equal(tensors_of(killed.directory), tensors_of(whole.directory))
    leftovers = [p.name for p in killed.directory.rglob("*") if p.name.startswith(".")]
    assert len(leftovers) <= 5  # what a kill leaves half-written is hidden, and never read


@pytest.mark.slow
def test_ctrl_c_leaves_a_run_that_can_go_on(small: dict[str, Any], tmp_path: Path) -> None:
    recipe = load_recipe({**small, "rounds": {"count": 400}, "evaluation": {"every": 400}})
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(recipe))
    command = [sys.executable, "-m", "fedcustom", "run", str(path), "--out", str(tmp_path / "run")]

    def hear_interrupts() -> None:  # a background job of a shell without a terminal starts deaf to them
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=hear_interrupts) as process:
        deadline = time.monotonic() + 120
        checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
        while max(checkpoints.rounds(), default=0) < 3 and time.monotonic() < deadline:  # the oldest go
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped; go on with: fedcustom run" in said
    assert "Traceback" not in said
    assert checkpoints.rounds()[-1] >= 3


def test_a_run_has_one_process(small: dict[str, Any], tmp_path: Path) -> None:
    """A second one is refused while the first is at it, and goes on afterwards."""
    directory = tmp_path / "run"
    with held(directory / "run.pid") as alone:
        assert alone
        with pytest.raises(RunError, match=f"process {os.getpid()} is at this run"):
            fedcustom.run(small, out=directory)
        assert [path.name for path in directory.iterdir()] == ["run.pid"]
    run = fedcustom.run(small, out=directory)
    assert (run.directory / "run.pid").read_text() == ""


def test_a_run_that_cannot_begin_leaves_nothing(small: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError):
        fedcustom.run(small, {"data.source": str(tmp_path / "nowhere")}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_files_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "a.txt", "old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_text(tmp_path / "a.txt", "new")
        with pytest.raises(OSError, match="No space left"):
            write_folder(tmp_path / "folder", lambda folder: write_json(folder / "x.json", 1))
        with pytest.raises(OSError, match="No space left"):
            write_tensors(tmp_path / "t.safetensors", {})
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_history_that_was_cut_off(tmp_path: Path) -> None:
    history = History(tmp_path / "metrics.jsonl")
    history.append({"round": 1})
    history.append({"round": 2})
    with history.path.open("a") as file:
        file.write('{"round": 3, "train')
    assert [row["round"] for row in History.read(history.path).rows] == [1, 2]
    again = History.read(history.path)
    again.keep_until(1)
    assert history.path.read_text() == '{"round": 1}\n'
    history.path.write_text('{"round": 1}\nnonsense\n{"round": 2}\n')
    with pytest.raises(RunError, match=r"metrics.jsonl, line 2: not JSON"):
        History.read(history.path)


def test_a_damaged_checkpoint_is_named(small: dict[str, Any], tmp_path: Path) -> None:
    run = fedcustom.run(small, out=tmp_path / "run")
    (run.directory / "summary.json").unlink()
    damaged = run.directory / "checkpoints" / "round-000002" / "state.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(RunError, match=r"state.safetensors: cannot be read"):
        fedcustom.run(small, out=tmp_path / "run", resume=True)


def test_json_without_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    write_json(tmp_path / "x.json", {"loss": 0.1})
    assert json.loads((tmp_path / "x.json").read_text()) == {"loss": 0.1}
