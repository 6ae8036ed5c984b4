"""Callbacks: the order of events, and what becomes of a run whose callback raises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import fedcustom


class Events(fedcustom.Callback):
    """Notes every event but phases."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_run_start(self, recipe: fedcustom.Recipe, done: int, directory: Path) -> None:
        self.seen.append(f"start {done}")

    def on_outline(self, outline: Any) -> None:
        self.seen.append(f"outline {outline.clients}")

    def on_round_start(self, number: int) -> None:
        self.seen.append(f"round {number}")

    def on_evaluate(self, number: int, metrics: dict[str, float]) -> None:
        self.seen.append(f"evaluate {number} {sorted(metrics)[0]}")

    def on_round_end(self, row: dict[str, Any]) -> None:
        self.seen.append(f"end {row['round']}")

    def on_checkpoint(self, number: int) -> None:
        self.seen.append(f"checkpoint {number}")

    def on_run_end(self, summary: Any) -> None:
        self.seen.append(f"finished {summary['rounds']}")


SETTINGS = {
    "rounds.count": 3,
    "evaluation.every": 2,
    "evaluation.select": "last",
    "rounds.checkpoint_every": 9,
}


def final(directory: Path) -> dict[str, torch.Tensor]:
    (newest,) = sorted(directory.glob("checkpoints/round-*"))[-1:]
    return safetensors.torch.load_file(newest / "state.safetensors")


def test_events_come_in_the_order_of_the_loop(small: dict[str, Any], tmp_path: Path) -> None:
    events = Events()
    fedcustom.run(small, SETTINGS, out=tmp_path / "run", callbacks=[events])
    assert events.seen == [
        "start 0", "outline 4", "evaluate 0 accuracy", "end 0",
        "round 1", "end 1",
        "round 2", "evaluate 2 accuracy", "end 2", "checkpoint 2",
        "round 3", "evaluate 3 accuracy", "end 3", "checkpoint 3",
        "finished 3",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "event", ["on_run_start", "on_round_start", "on_evaluate", "on_round_end", "on_phase"]
)
def test_a_callback_that_raises_loses_no_round(small: dict[str, Any], tmp_path: Path, event: str) -> None:
    """The round is finished and its checkpoint written, though none was due; other callbacks are told."""
    whole = fedcustom.run(small, SETTINGS, out=tmp_path / "whole")

    class Broken(fedcustom.Callback):
        pass

    def broken(self: Any, *arguments: Any) -> None:
        raise ValueError("my own mistake")

    setattr(Broken, event, broken)
    events, out = Events(), tmp_path / "run"
    with pytest.raises(ValueError, match="my own mistake"):
        fedcustom.run(small, SETTINGS, out=out, callbacks=[Broken(), events])
    if event in ("on_phase", "on_run_start"):  # nothing is lost yet
        assert not any("round" in seen or "checkpoint" in seen for seen in events.seen)
        assert not (out / "metrics.jsonl").exists()
    else:
        assert events.seen[-1] == "checkpoint 1"
        rows = [json.loads(line)["round"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert rows == [0, 1]
    resumed = fedcustom.run(small, SETTINGS, out=out, resume=True)
    assert resumed.summary["metrics"] == whole.summary["metrics"]
    assert resumed.summary["untuned"] == whole.summary["untuned"]
    for name, tensor in final(tmp_path / "whole").items():
        assert torch.equal(tensor, final(out)[name])


def test_a_callback_that_raises_at_the_end_loses_nothing(small: dict[str, Any], tmp_path: Path) -> None:
    class Broken(fedcustom.Callback):
        def on_run_end(self, summary: Any) -> None:
            raise ValueError("my own mistake")

    with pytest.raises(ValueError, match="my own mistake"):
        fedcustom.run(small, {"rounds.count": 1}, out=tmp_path / "run", callbacks=[Broken()])
    assert fedcustom.load(tmp_path / "run").summary["rounds"] == 1


def test_a_run_that_fails_after_a_callback_says_so(small: dict[str, Any], tmp_path: Path) -> None:
    class Broken(fedcustom.Callback):
        def on_round_start(self, number: int) -> None:
            raise ValueError("my own mistake")

    with pytest.raises(fedcustom.FedcustomError) as caught:
        fedcustom.run(
            small,
            {"training.learning_rate": 1e30, "training.clip_norm": 0, "training.optimizer": "sgd"},
            out=tmp_path / "run",
            callbacks=[Broken()],
        )
    assert "my own mistake" in "".join(caught.value.__notes__)


def test_what_a_callback_does_to_its_copies_stays_there(small: dict[str, Any], tmp_path: Path) -> None:
    class Greedy(fedcustom.Callback):
        def on_evaluate(self, number: int, metrics: dict[str, float]) -> None:
            metrics.clear()

        def on_round_end(self, row: dict[str, Any]) -> None:
            row.clear()

    run = fedcustom.run(small, {"rounds.count": 1}, out=tmp_path / "run", callbacks=[Greedy()])
    assert run.history["development.accuracy"].notna().all()


@pytest.mark.parametrize("given", [Events, "verbose", print])
def test_what_is_no_callback_is_refused(small: dict[str, Any], tmp_path: Path, given: Any) -> None:
    with pytest.raises(TypeError, match=r"callbacks: .* is no instance of fedcustom\.Callback"):
        fedcustom.run(small, out=tmp_path / "run", callbacks=[given])
    assert not (tmp_path / "run").exists()
