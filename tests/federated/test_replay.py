"""Replay: a finished run's rounds once more, bit by bit, or one line that says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fedcustom
from fedcustom.core.errors import RunError
from fedcustom.core.files import read_tensors, write_tensors
from fedcustom.federated.callbacks import Callback
from fedcustom.federated.replay import Replay
from fedcustom.federated.run_directory import Checkpoints
from fedcustom.transport.protocol import Reply
from fedcustom.updates.transform import ClientContext, UpdateTransform
from helpers.recipes import changed


def nothing(number: int, reply: Reply) -> None:
    pass


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum at the server": {"aggregation": {"server_optimizer": "fedadam"}},
    "memories": {"personalisation": {"keep": ["head"]}, "training": {"fit_head": False}},
    "compressed": {"compression": {"kind": "top_k", "fraction": 0.3, "error_feedback": True}},
    "late": {"participation": {"buffer": 2}, "training": {"fit_head": False}},
    "absent": {"participation": {"dropout": 0.3, "partial": 0.5}},
    "corrected": {
        "aggregation": {"correction": "scaffold"},
        "training": {"optimizer": "sgd", "momentum": 0.0, "clip_norm": 0.0, "fit_head": False},
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_rounds_are_those_of_the_run(small: dict[str, Any], tmp_path: Path, variant: str) -> None:
    recipe = {**small, **VARIANTS[variant], "rounds": {"count": 4, "clients_per_round": 3}}
    run = fedcustom.run(recipe, out=tmp_path / "run")
    before, replies = files(run.directory), list[tuple[int, Reply]]()
    kept = Checkpoints(run.directory / "checkpoints").rounds()
    with Replay(run.directory, lambda number, reply: replies.append((number, reply))) as replay:
        last = replay.round(2)
        assert last.checkpoint == (2 in kept)
        last = replay.round(4)
    assert last.checkpoint
    final = Checkpoints(run.directory / "checkpoints").load(4).state
    assert last.after.tensors.keys() == final.tensors.keys()
    assert all(torch.equal(last.after.tensors[n], t) for n, t in final.tensors.items())
    assert files(run.directory) == before  # the run's directory stays as it is
    rows = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    assert 4 in {number for number, _ in replies}
    for row in rows:
        asked = {reply.client for number, reply in replies if number == row["round"]}
        assert not asked or asked == set(row["cohort"])


def test_it_goes_on_from_a_checkpoint(small: dict[str, Any], tmp_path: Path) -> None:
    """Rounds before one that is kept are not repeated."""
    run = fedcustom.run({**small, "rounds": {"count": 4}, "evaluation": {"every": 1}}, out=tmp_path / "run")
    with Replay(run.directory, nothing) as replay:
        (source,) = {n for n in [*replay.source.checkpoints.rounds(), 0] if n < 4} - {0} or {0}
    seen: set[int] = set()
    with Replay(run.directory, lambda number, reply: seen.add(number)) as replay:
        assert replay.round(4).checkpoint
    assert seen == set(range(source + 1, 5))


def test_what_the_server_gets_is_seen(small: dict[str, Any], tmp_path: Path) -> None:
    """After compression: all but the kept share of a change is zero."""
    recipe = {**small, "compression": {"kind": "top_k", "fraction": 0.1, "error_feedback": False}}
    recipe |= {"training": {"fit_head": False}}
    run = fedcustom.run(recipe, out=tmp_path / "run")
    shares = []

    def seen(number: int, reply: Reply) -> None:
        assert reply.update is not None
        flat = torch.cat([t.flatten() for t in reply.update.tensors.values()])
        shares.append(float((flat != 0).double().mean()))

    with Replay(run.directory, seen) as replay:
        replay.round(1)
    assert shares
    assert max(shares) < 0.12


def test_the_thread_count_is_that_of_the_run(small: dict[str, Any], tmp_path: Path) -> None:
    run, before = fedcustom.run(small, out=tmp_path / "run"), torch.get_num_threads()
    file = run.directory / "environment.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "threads": before + 1}))
    found = []
    with Replay(run.directory, lambda number, reply: found.append(torch.get_num_threads())) as replay:
        replay.round(1)
    assert set(found) == {before + 1}
    assert torch.get_num_threads() == before


class Half(UpdateTransform):
    """Halves every change."""

    name = "half"

    def on_client(self, update: Any, context: ClientContext) -> Any:
        from dataclasses import replace

        return replace(update, tensors={n: t / 2 for n, t in update.tensors.items()})


def test_transforms_of_the_caller_are_needed(small: dict[str, Any], tmp_path: Path) -> None:
    recipe = {**small, "training": {"fit_head": False}}
    run = fedcustom.run(recipe, out=tmp_path / "run", transforms=[Half()])
    with pytest.raises(RunError, match=r"had transforms of updates \(Half\(\) there, none here\)"):
        Replay(run.directory, nothing)
    with Replay(run.directory, nothing, transforms=[Half()]) as replay:
        assert replay.round(2).checkpoint


def test_other_data_are_refused(small: dict[str, Any], tmp_path: Path, data_folder: Path) -> None:
    for file in data_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    run = fedcustom.run({**small, "data": {**small["data"], "source": str(tmp_path)}}, out=tmp_path / "run")
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    first = {**json.loads(lines[0]), "text": "another text"}
    (tmp_path / "train.jsonl").write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    with pytest.raises(RunError, match=r"cannot be replayed: the data have changed: the rows of 1 of 4"):
        Replay(run.directory, nothing)


def test_another_state_is_refused(small: dict[str, Any], tmp_path: Path) -> None:
    """One number of the last checkpoint, or of a round's row, that is other than what the round gives."""
    run = fedcustom.run(small, out=tmp_path / "run")
    file = run.directory / "checkpoints" / "round-000002" / "state.safetensors"
    tensors = read_tensors(file)
    name = next(n for n in tensors if n.startswith("global/"))
    write_tensors(file, {**tensors, name: torch.nextafter(tensors[name], torch.tensor(torch.inf))})
    said = rf"after round 2 {name.partition('/')[2]} differs by up to"
    with Replay(run.directory, nothing) as replay, pytest.raises(RunError, match=said):
        replay.round(2)
    rows = (run.directory / "metrics.jsonl").read_text().splitlines()
    first = json.loads(rows[1])
    assert first["round"] == 1
    (run.directory / "metrics.jsonl").write_text(
        "\n".join([rows[0], json.dumps({**first, "examples": first["examples"] + 1}), *rows[2:]]) + "\n"
    )
    said = r"round 1 has another examples \(.* there, .* here\)"
    with Replay(run.directory, nothing) as replay, pytest.raises(RunError, match=said):
        replay.round(1)


def test_nothing_is_left_behind(small: dict[str, Any], tmp_path: Path) -> None:
    run = fedcustom.run(changed(small), out=tmp_path / "run")
    with Replay(run.directory, nothing, Callback()) as replay:
        place = Path(replay._scratch.name)
        assert place.is_dir()
        assert place.stat().st_mode & 0o077 == 0  # clients' private tensors
        replay.round(1)
        with pytest.raises(ValueError, match="round 1"):
            replay.round(1)
        with pytest.raises(ValueError, match="round 3"):
            replay.round(3)
    assert not place.exists()


@pytest.mark.parametrize("baseline", ["centralised", "local"])
def test_baselines_send_nothing(small: dict[str, Any], tmp_path: Path, baseline: str) -> None:
    run = fedcustom.run({**small, "baseline": baseline}, out=tmp_path / "run")
    with pytest.raises(RunError, match=f"a {baseline} baseline: its clients send nothing"):
        Replay(run.directory, nothing)


def test_what_is_no_finished_run(small: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such folder"):
        Replay(tmp_path / "none", nothing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="holds no run"):
        Replay(tmp_path / "empty", nothing)
    run = fedcustom.run(small, out=tmp_path / "run")
    (run.directory / "data.json").write_text(json.dumps({"clients": {}, "labels": [], "shared": {}}))
    with pytest.raises(RunError, match="no record of its clients' rows"):
        Replay(run.directory, nothing)
    (run.directory / "summary.json").unlink()
    with pytest.raises(RunError, match="not finished"):
        Replay(run.directory, nothing)
