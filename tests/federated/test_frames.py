"""A run's history as frames, against the lines it is made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fedcustom
from fedcustom.federated.history_frames import CLIENT_COLUMNS, client_frame, round_frame
from helpers.runs import rows_of


def line(number: int, clients: list[str], **more: Any) -> dict[str, Any]:
    """A line of ``metrics.jsonl`` in which every client answers with 10 bytes to 7."""
    return {
        "round": number,
        "cohort": clients,
        "answered": clients,
        "left_out": {},
        "late": {},
        "train_loss": 1.5,
        "bytes_up": dict.fromkeys(clients, 10),
        "bytes_down": dict.fromkeys(clients, 7),
        "bytes_up_total": 10 * len(clients) * number,
        "bytes_down_total": 7 * len(clients) * number,
        "seconds": {"train": 2.0, "evaluate": 0.5},
    } | more


def test_columns_do_not_depend_on_the_number_of_clients() -> None:
    few, many = (
        round_frame([{"round": 0, "development": {"accuracy": 0.1}}, line(1, names), line(2, names)])
        for names in (["a", "b"], [f"client-{number}" for number in range(5000)])
    )
    assert list(few.columns) == list(many.columns)
    assert list(many["answered"]) == [0, 5000, 5000]
    assert list(many["bytes_up"]) == [0, 50_000, 50_000]
    assert list(many["bytes_down_total"]) == [0, 35_000, 70_000]
    assert str(many["bytes_up"].dtype) == "int64"
    assert many["seconds.train"].isna().tolist() == [True, False, False]
    assert many["development.accuracy"].iloc[0] == 0.1


def test_clients_by_round() -> None:
    rows = [
        {"round": 0, "development": {}},
        line(1, ["a", "b"]),
        line(
            2,
            ["b", "c", "d"],
            answered=["b", "c"],
            left_out={"d": "loss is not finite"},
            late={"c": 2},
            bytes_up={"b": 11, "c": 12},
            norms={"b": 0.5, "c": 1.5},
            steps={"b": 3, "c": 4},
        ),
    ]
    frame = client_frame(rows)
    assert tuple(frame.columns) == CLIENT_COLUMNS
    said = frame.astype(object).where(frame.notna(), None)
    assert [tuple(values) for values in said.to_numpy().tolist()] == [
        (1, "a", 10, 7, True, None, 0, None, None),
        (1, "b", 10, 7, True, None, 0, None, None),
        (2, "b", 11, 7, True, None, 0, 0.5, 3),
        (2, "c", 12, 7, True, None, 2, 1.5, 4),
        (2, "d", 0, 7, False, "loss is not finite", 0, None, None),
    ]
    rounds = round_frame(rows)
    assert rounds[["cohort", "answered", "left_out", "late"]].to_numpy().tolist() == [
        [0, 0, 0, 0],
        [2, 2, 0, 0],
        [3, 2, 1, 1],
    ]
    assert tuple(client_frame([]).columns) == CLIENT_COLUMNS


def test_a_runs_frames_add_up(small: dict[str, Any], tmp_path: Path) -> None:
    run = fedcustom.run(small, {"rounds.clients_per_round": 3}, out=tmp_path / "run")
    rows, rounds, clients = rows_of(run.directory), run.history, run.client_history
    assert len(rounds) == len(rows) == 3
    assert len(clients) == sum(len(row["cohort"]) for row in rows[1:]) == 6
    for way in ("bytes_up", "bytes_down"):
        by_round = clients.groupby("round")[way].sum()
        assert list(by_round) == list(rounds[way][1:]) == [sum(row[way].values()) for row in rows[1:]]
        assert clients[way].sum() == run.summary["bytes"][f"{way.removeprefix('bytes_')}_total"]
    assert clients["answered"].all()
    assert clients["left_out"].isna().all()
    names = {name for row in rows[1:] for name in row["cohort"]}
    assert not any(name in column for column in rounds.columns for name in names)
    assert rounds["train_loss"].iloc[-1] == pytest.approx(rows[-1]["train_loss"])
