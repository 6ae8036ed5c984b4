"""Trackers, against the real TensorBoard, MLflow and Weights & Biases on this machine."""

from __future__ import annotations

import json
import math
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import fedcustom
from fedcustom.core.errors import FedcustomError
from fedcustom.experiment.grid import digest
from fedcustom.federated.tracking.variables import held
from fedcustom.recipe import load_recipe
from helpers.runs import StopAt, rows_of
from helpers.tracking import Points, check, check_event_files, expected


def mlflow_client(store: Path) -> Any:
    from mlflow import MlflowClient

    with mock.patch.dict(os.environ, {"MLFLOW_ALLOW_FILE_STORE": "true"}):
        return MlflowClient(tracking_uri=store.as_uri())


def mlflow_runs(store: Path, project: str = "fedcustom") -> list[Any]:
    client = mlflow_client(store)
    experiment = client.get_experiment_by_name(project)
    return list(client.search_runs([experiment.experiment_id])) if experiment else []


def in_mlflow(store: Path, run: Any) -> Points:
    client, found = mlflow_client(store), Points()
    for name in run.data.metrics:
        for metric in client.get_metric_history(run.info.run_id, name):
            found.setdefault(name, {}).setdefault(metric.step, []).append(metric.value)
    return found


def wandb_records(content: bytes) -> Iterator[bytes]:
    """The records of a file of an offline run: 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    assert content[:4] == b":W&B"
    place, parts = 7, b""
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


def in_wandb(directory: Path) -> tuple[list[str], Points, set[str]]:
    """The ids of the runs in the files of offline runs, their points, and the kinds of their records."""
    from wandb.proto import wandb_internal_pb2

    ids, found, kinds = [], Points(), set()
    for file in sorted((directory / "wandb").glob("offline-run-*/*.wandb")):
        for data in wandb_records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            kinds.add(record.WhichOneof("record_type"))
            if record.HasField("run"):
                ids.append(record.run.run_id)
                assert record.run.host == "fedcustom"
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json)
                     for item in record.history.item}  # fmt: skip
            if "_step" in items:
                for name, value in items.items():
                    if not name.startswith("_"):
                        found.setdefault(name, {}).setdefault(items["_step"], []).append(value)
    return ids, found, kinds


@pytest.fixture
def recipe(small: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return {
        **small,
        "rounds": {"count": 3},
        "tracking": {"to": ["tensorboard", "mlflow", "wandb"], "uri": str(tmp_path / "mlruns"),
                     "offline": True, "model": True, "timeout": 300.0},
    }  # fmt: skip


def test_a_run_that_goes_on_is_one_run_with_each_point_once(recipe: dict[str, Any], tmp_path: Path) -> None:
    run, store = tmp_path / "first", tmp_path / "mlruns"
    with pytest.raises(RuntimeError, match="stopped"):
        fedcustom.run(recipe, out=run, callbacks=[StopAt(2)])
    assert [each.info.status for each in mlflow_runs(store)] == ["FAILED"]
    known = json.loads((run / "tracking.json").read_text())
    fedcustom.run(recipe, out=run, resume=True)

    check_event_files(run)
    (tracked,) = mlflow_runs(store)
    assert (tracked.info.run_name, tracked.info.status) == ("first", "FINISHED")
    assert tracked.info.run_id == known["mlflow"]["run_id"]
    check(in_mlflow(store, tracked), run)
    assert tracked.data.params["method.name"] == "prefix"
    assert not [name for name in tracked.data.params if name.startswith("tracking")]
    client = mlflow_client(store)
    files = {file.path for file in client.list_artifacts(tracked.info.run_id)}
    assert files == {"recipe.toml", "summary.json", "metrics.jsonl", "model"}
    assert {Path(file.path).name for file in client.list_artifacts(tracked.info.run_id, "model")} == {
        path.name for path in (run / "model").iterdir()
    }
    ids, points, kinds = in_wandb(run)
    assert set(ids) == {known["wandb"]["id"]}
    for name, steps in expected(run).items():
        assert points[name] == {step: [value] for step, value in steps.items()}
    assert not kinds & {"stats", "output", "output_raw"}  # neither the machine nor the console

    before = sorted((run / "tensorboard").iterdir())
    fedcustom.run(recipe, out=run, resume=True)  # everything is there
    assert sorted((run / "tensorboard").iterdir()) == before


def test_trackers_are_no_part_of_a_run_s_identity(small: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(RuntimeError, match="stopped"):
        fedcustom.run(small, out=run, callbacks=[StopAt(1)])
    tracked = {**small, "tracking": {"to": ["tensorboard"]}}
    fedcustom.run(tracked, out=run, resume=True)
    check_event_files(run)  # the rounds before too
    assert digest(load_recipe(tracked)) == digest(load_recipe(small))
    assert not (tmp_path / "mlruns").exists()


def test_a_finished_run_is_delivered_to_a_tracker_that_lacks_it(
    small: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    fedcustom.run(small, out=run)
    fedcustom.run({**small, "tracking": {"to": ["tensorboard"]}}, out=run)
    check_event_files(run)


class Notes(fedcustom.Callback):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.facts: list[str] = []
        self.ended = 0.0

    def on_run_end(self, summary: Any) -> None:
        self.ended = time.monotonic()

    def on_note(self, text: str) -> None:
        self.notes.append(text)

    def on_information(self, text: str) -> None:
        self.facts.append(text)


@pytest.fixture
def silent_server() -> Iterator[int]:
    """The port of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    held.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        for connection in held:
            connection.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.parametrize("kind", ["refuses", "silent"])
def test_a_server_that_does_not_answer_costs_a_warning_and_bounded_time(
    small: dict[str, Any], tmp_path: Path, silent_server: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.delenv(name, raising=False)
    port, notes = silent_server if kind == "silent" else free_port(), Notes()
    tracking = {"to": ["mlflow", "tensorboard"], "uri": f"http://127.0.0.1:{port}", "timeout": 2.0}
    run = tmp_path / "run"
    fedcustom.run({**small, "tracking": tracking}, out=run, callbacks=[notes])
    assert time.monotonic() - notes.ended < 60  # MLflow alone would take minutes
    warnings = [text for text in notes.notes if "tracking" in text]
    assert len(warnings) == 1, warnings
    assert warnings[0].startswith("tracking: mlflow: ")
    (fact,) = [text for text in notes.facts if "tracking" in text]
    rounds = len(rows_of(run))
    assert fact.startswith(f"tracking: mlflow lacks {rounds} of {rounds} rounds and the result")
    assert "tracking: mlflow" in (run / "warnings.log").read_text()
    check_event_files(run)  # the other tracker is not held up

    store = tmp_path / "store"  # the server is back, or another one
    fedcustom.run({**small, "tracking": {"to": ["mlflow"], "uri": str(store)}}, out=run)
    (tracked,) = mlflow_runs(store)
    check(in_mlflow(store, tracked), run)


def test_variables_of_the_environment_are_taken_back(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a run that fails; what the user has set is used and stays."""
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "WANDB_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    tracking = {"to": ["mlflow", "wandb"], "uri": str(tmp_path / "store"), "offline": True, "timeout": 300.0}
    before, during = dict(os.environ), dict[str, str]()

    class Looks(fedcustom.Callback):
        def on_round_end(self, row: Any) -> None:
            during.update(os.environ)

    fedcustom.run({**small, "tracking": tracking}, out=tmp_path / "run", callbacks=[Looks()])
    assert during["MLFLOW_ALLOW_FILE_STORE"] == "true"
    assert during["WANDB_ERROR_REPORTING"] == "false"
    assert during["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "7"
    ours = [name for name in during if name.startswith(("MLFLOW_", "WANDB_"))]
    assert {name: os.environ.get(name) for name in ours} == {name: before.get(name) for name in ours}
    with pytest.raises(RuntimeError, match="stopped"):
        fedcustom.run({**small, "tracking": tracking}, out=tmp_path / "other", callbacks=[StopAt(1)])
    assert {name: os.environ.get(name) for name in ours} == {name: before.get(name) for name in ours}


def test_a_variable_stays_while_one_run_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ONE_OF_THEM", "ANOTHER"):
        monkeypatch.setenv(name, "")  # so that it is unset again at the end
        monkeypatch.delenv(name)
    monkeypatch.setenv("OWN", "mine")
    first, second = held({"ONE_OF_THEM": "1", "OWN": "1"}), held({"ONE_OF_THEM": "2", "ANOTHER": "2"})
    first.__enter__()
    second.__enter__()
    assert [os.environ[name] for name in ("ONE_OF_THEM", "ANOTHER", "OWN")] == ["1", "2", "mine"]
    first.__exit__(None, None, None)
    assert os.environ["ONE_OF_THEM"] == "1"
    os.environ["ANOTHER"] = "set by the user meanwhile"
    second.__exit__(None, None, None)
    assert "ONE_OF_THEM" not in os.environ
    assert os.environ["ANOTHER"] == "set by the user meanwhile"
    assert os.environ["OWN"] == "mine"


def test_what_a_recipe_may_not_say(small: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    def said(**tracking: Any) -> str:
        with pytest.raises(FedcustomError) as raised:
            fedcustom.run({**small, "tracking": tracking}, out=tmp_path / "run")
        return str(raised.value)

    assert "tracking.to" in said(to=["tensorflow"])
    assert "names a tracker twice" in said(to=["wandb", "wandb"])
    assert "must hold no credentials" in said(to=["mlflow"], uri="http://me:secret@host:5000")
    assert "must begin with http://" in said(to=["mlflow"], uri="ftp://host")
    monkeypatch.setattr("fedcustom.federated.tracking.follow.find_spec", lambda name: None)
    assert "mlflow needs its package: pip install 'fedcustom[mlflow]'" in said(to=["mlflow"])
    assert not (tmp_path / "run").exists()


def test_figures_that_are_no_numbers_are_left_out() -> None:
    from fedcustom.federated.tracking.figures import of_round

    row = {
        "round": 2,
        "train_loss": None,
        "refused": "why",
        "norms": {"a": 1.0},
        "bytes_up": {"a": 3, "b": 4},
        "seconds": {"train": math.inf},
        "method": {"head": "kept", "share": 0.5, "on": True},
    }
    found = of_round(row)
    assert found["method/share"] == 0.5
    assert found["bytes_up"] == 7
    lacking = {"train_loss", "refused", "method/head", "method/on", "norms", "norms/a", "seconds/train"}
    assert not found.keys() & lacking


def test_runs_of_a_comparison_stand_under_one_run(small: dict[str, Any], tmp_path: Path) -> None:
    from fedcustom.experiment.compare import comparison_cells, run_comparison, run_directory

    store, out = tmp_path / "mlruns", tmp_path / "compared"
    tracking = {"to": ["mlflow", "tensorboard"], "uri": str(store), "project": "mine", "timeout": 300.0}
    cells = comparison_cells(load_recipe({**small, "tracking": tracking}), ["prefix", "lora"], seeds=1)
    assert not run_comparison(cells, out)
    runs = {run.info.run_name: run for run in mlflow_runs(store, "mine")}
    assert set(runs) == {"compared", "prefix, seed 0", "lora, seed 0"}
    parent = runs.pop("compared")
    for cell in cells:
        place = run_directory(cell, out)
        run = runs[f"{cell.recipe.method.name}, seed 0"]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["fedcustom.group"] == "compared"
        check(in_mlflow(store, run), place)
        check_event_files(place)
    more = comparison_cells(load_recipe({**small, "tracking": tracking}), ["bitfit"], seeds=1)
    assert not run_comparison([*cells, *more], out)  # those that are finished stay as they are
    assert len(mlflow_runs(store, "mine")) == 4
    (added,) = [run for run in mlflow_runs(store, "mine") if run.info.run_name == "bitfit, seed 0"]
    assert added.data.tags["mlflow.parentRunId"] == parent.info.run_id


def test_a_comparison_whose_server_is_dead_says_so_once(small: dict[str, Any], tmp_path: Path) -> None:
    from fedcustom.federated.tracking.group import Group

    said: list[str] = []
    settings = load_recipe(
        {**small, "tracking": {"to": ["mlflow"], "uri": f"http://127.0.0.1:{free_port()}", "timeout": 2.0}}
    ).tracking
    group = Group(tmp_path, "compared", said.append)
    named = [group.named(settings, name) for name in ("a", "b")]
    assert [(each.name, each.group, each.parent) for each in named if each] == [
        ("a", "compared", None),
        ("b", "compared", None),
    ]
    assert len(said) == 1
    assert said[0].endswith("the runs of compared have no parent there")
    assert group.named(None, "c") is None


def test_sites_are_not_told_of_trackers(small: dict[str, Any]) -> None:
    from fedcustom.deployment.participants import shown_recipe

    shown = shown_recipe(load_recipe({**small, "tracking": {"to": ["mlflow"], "uri": "http://host:5000"}}))
    assert "tracking" not in shown
