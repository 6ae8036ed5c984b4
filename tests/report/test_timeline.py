"""Timelines: which client answered in which round."""

from __future__ import annotations

import re
from pathlib import Path

from fedcustom.report import write_report
from fedcustom.report.groups import group_runs
from fedcustom.report.read import Round, read_runs
from fedcustom.report.timeline import state_of, timeline, timelines
from helpers.report import Tags, write_run

HISTORY = [
    Round(1, cohort=["a", "b"], left_out={"b": "not connected"}),
    Round(2, cohort=["a", "b"], late={"a": 1, "b": 0}),
    Round(3, cohort=["a"]),
]


def test_states() -> None:
    states = [[state_of(line, client) for line in HISTORY] for client in ("a", "b")]
    assert states == [["answered", "late", "answered"], ["absent", "answered", None]]


def marks(chart: str) -> list[tuple[str, str]]:
    return [(symbol, tip) for symbol, tip in re.findall(r'#mark-([\w-]+)"[^>]*data-tip="([^"]*)"', chart)]


def test_each_round_has_its_symbol() -> None:
    chart = timeline(HISTORY)
    assert chart is not None
    assert sorted(marks(chart)) == [
        ("diamond", "round 2: late by 1 round"),
        ("square", "round 1: answered"),
        ("square", "round 2: answered"),
        ("square", "round 3: answered"),
        ("x", "round 1: absent (not connected)"),
    ]


def test_many_rounds_are_spans() -> None:
    history = [
        Round(number, cohort=["a"], left_out={"a": "lost"} if 11 <= number <= 20 else {})
        for number in range(1, 101)
    ]
    chart = timeline(history)
    assert chart is not None
    spans = re.findall(r'class="span" x="([\d.]+)%"[^>]*width="([\d.]+)%"[^>]*data-tip="([^"]*)"', chart)
    assert [(float(x), float(width), tip) for x, width, tip in spans] == [
        (0, 10, "rounds 1–10: answered"),
        (10, 10, "rounds 11–20: absent (lost)"),
        (20, 80, "rounds 21–100: answered"),
    ]
    assert timeline([Round(1)]) is None
    assert timeline([Round(1, cohort=[str(number) for number in range(33)])]) is None


def test_runs_that_have_one(tmp_path: Path) -> None:
    write_run(tmp_path / "plain")
    write_run(tmp_path / "missed", method="lora", left_out={"torch": "not connected"})
    write_run(tmp_path / "deployed", method="ia3")
    (tmp_path / "deployed" / "run_id").write_text("x")
    found = timelines(group_runs(read_runs([tmp_path]).finished))
    assert {line.run for line in found} == {"Federated LoRA, seed 0", "Federated IA3, seed 0"}
    page = Tags(write_report([tmp_path], tmp_path / "report.html"))
    assert "timeline" in page.plots()


def test_a_last_line_that_is_half_written_is_no_error(tmp_path: Path) -> None:
    place = write_run(tmp_path / "run", rounds=3)
    with (place / "metrics.jsonl").open("a") as file:
        file.write('{"round": 4, "devel')
    (run,) = read_runs([tmp_path]).finished
    assert [line.round for line in run.history] == [0, 1, 2, 3]
