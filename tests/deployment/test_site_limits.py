"""The ledger, limits and files of a site, each by itself."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fedcustom.core.errors import DeploymentError, PolicyError
from fedcustom.core.text import printable
from fedcustom.deployment.site.ledger import Ledger
from fedcustom.deployment.site.limits import TaskStopped, limit_memory, stoppable
from fedcustom.deployment.site.models import is_local
from fedcustom.deployment.site.policy import check_work
from fedcustom.deployment.site.request import Request
from fedcustom.deployment.site.settings import PolicySettings, load_site
from fedcustom.deployment.site.template import site_template
from fedcustom.federated.resolve import resolved
from fedcustom.recipe.recipe import load_recipe
from helpers.rows import make_rows, write_jsonl

RUN = "0123456789abcdef"

NOON = datetime(2030, 5, 1, 12, 30, tzinfo=UTC)

DATA = 'train = "rows.jsonl"\ncolumns = ["text", "label"]\ntext = "{text}"\nlabel = "label"\n'


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.time = NOON

    def __call__(self) -> datetime:
        return self.time


def test_the_ledger_counts_by_day_and_in_all_across_restarts(tmp_path: Path) -> None:
    """Against sums made by hand over a list of (hour, rounds, bytes)."""
    clock, events = Clock(), [(0, 2, 10), (5, 1, 20), (23, 3, 30), (25, 1, 40), (49, 2, 50)]
    for hour, rounds, size in events:
        clock.time = NOON + timedelta(hours=hour)
        ledger = Ledger(tmp_path / "ledger.json", clock)
        for number in range(rounds):
            ledger.note_round(f"{hour:016x}", f"{number}")
            ledger.note_round(f"{hour:016x}", f"{number}")
        ledger.note_run(f"{hour:016x}")
        ledger.add(f"{hour:016x}", bytes=size)
        again = Ledger(tmp_path / "ledger.json", clock)
        recent = [event for event in events if hour - 24 <= event[0] <= hour]
        assert again.last_day("rounds") == sum(event[1] for event in recent)
        assert again.last_day("bytes") == sum(event[2] for event in recent)
        assert again.total("rounds") == sum(event[1] for event in events if event[0] <= hour)
    content = json.loads((tmp_path / "ledger.json").read_text())
    assert len(content["runs"]) == len(events), "no run is deleted"
    assert content["totals"] == {"rounds": 9, "runs": 5, "bytes": 150}
    clock.time = NOON - timedelta(days=300)  # the clock is set back: nothing is free again
    assert Ledger(tmp_path / "ledger.json", clock).last_day("rounds") >= 3


def test_limits_by_wall_time_open_again_the_next_day(tmp_path: Path) -> None:
    clock, policy, recipe = Clock(), PolicySettings(max_rounds_per_day=1, max_rounds=2), load_recipe({})
    ledger = Ledger(tmp_path / "ledger.json", clock)

    def ask(number: int) -> None:
        request = Request("work", RUN, {}, "train", number)
        check_work(policy, ledger, recipe, request, begins=True, queries=0)
        ledger.note_round(RUN, request.digest)

    ask(1)
    ask(1)  # the same again
    with pytest.raises(PolicyError, match="max_rounds_per_day = 1: 1 have been answered"):
        ask(2)
    clock.time += timedelta(hours=25)
    ask(2)
    clock.time += timedelta(hours=25)
    with pytest.raises(PolicyError, match="max_rounds = 2: 2 have been answered"):
        ask(3)


SOUND_LEDGER: dict[str, Any] = {"totals": {}, "hours": {}, "days": {}, "runs": {}, "unfinished": {}}


@pytest.mark.parametrize("part", [
    *({"totals": []}, {"totals": {"bytes": "x"}}, {"totals": {"rounds": -5}}, {"hours": {"a": 3}}),
    *({"days": None}, {"unfinished": {"a": True}}, {"runs": {"a": []}}, {"runs": {"a": {"rounds": 3}}}),
    *({"runs": {"a": {"evaluations": {"test": "x"}}}}, {"runs": {"a": {"tasks": -1}}}, {"more": {}}),
])  # fmt: skip
def test_a_ledger_of_another_form_is_damaged(tmp_path: Path, part: dict[str, Any]) -> None:
    path = tmp_path / "ledger.json"
    path.write_text(json.dumps(SOUND_LEDGER))
    assert Ledger(path).total("rounds") == 0
    path.write_text(json.dumps(SOUND_LEDGER | part))
    with pytest.raises(DeploymentError, match=rf"ledger\.json: is no ledger \({next(iter(part))}"):
        Ledger(path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"totals": {}}', '"\\ud800"'])
def test_a_damaged_ledger_is_no_new_one(tmp_path: Path, text: str) -> None:
    (tmp_path / "ledger.json").write_text(text)
    with pytest.raises(DeploymentError, match=r"ledger\.json"):
        Ledger(tmp_path / "ledger.json")


def test_what_earlier_versions_counted_is_taken_over(tmp_path: Path) -> None:
    for run, content in (("a" * 16, {"bytes": 70, "rounds": [1, 2], "work": 3}), ("b" * 16, {"bytes": "x"})):
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "sent.json").write_text(json.dumps(content))
    ledger = Ledger(tmp_path / "ledger.json")
    assert [ledger.total(count) for count in ("rounds", "tasks", "bytes")] == [2, 3, 70]


def endless(cancel: Path) -> None:
    with stoppable(0.2, cancel):
        while True:
            time.sleep(0.001)


def test_work_is_stopped_in_time_and_what_follows_is_not(tmp_path: Path) -> None:
    for _ in range(3):
        begun = time.monotonic()
        with pytest.raises(TaskStopped, match=r"max_task_seconds = 0\.2"):
            endless(tmp_path / "cancel")
        assert 0.2 <= time.monotonic() - begun < 5
        with stoppable(30, tmp_path / "cancel"):
            time.sleep(0.01)
    with pytest.raises(ValueError, match="own"), stoppable(30, tmp_path / "cancel"):
        raise ValueError("own")
    time.sleep(0.3)  # nothing is on its way


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="enforced on Linux")
def test_an_allocation_beyond_the_limit_fails() -> None:
    script = """
from fedcustom.deployment.site.limits import limit_memory
limit_memory(0.5)
held = bytearray(50_000_000)
try:
    bytearray(1_000_000_000)
except MemoryError:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "refused\n", done.stderr


def test_a_platform_without_such_a_limit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_memory(None)
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(DeploymentError, match="cannot be enforced on darwin, only on Linux"):
        limit_memory(4)


def test_foreign_text_is_shown_escaped() -> None:
    assert printable("a\x1b[2Jb\n\ud800\u202e\x9b ä", lines=False) == "a\\x1b[2Jb\\n\\ud800\\u202e\\x9b ä"
    assert printable("x" * 2000, longest=1000) == "x" * 1000 + " ..."


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("builtin:minilm", False), ("org/model", False), ("gpt2", False), ("/m", True), ("~/m", True),
        ("./m", True), ("..", True), ("a/b/c", True), ("a\\b", True), ("", True), ("file://m", True),
    ],
)  # fmt: skip
def test_names_of_models_on_this_machine(name: str, local: bool) -> None:
    assert is_local(name) == local


# --- site.toml ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[data]\ntrain = 'x'", r'data.columns is not set .* columns = \["text", "label"\]'),
        ("[data]\ncolumns = ['a']\ntext = '{b}'", "data.text names the column 'b', .* allowed: a"),
        ("[data]\ncolumns = ['a']\nlabel = 'b'", "data.label names the column 'b'"),
        ("[data]\ncolumns = ['a']\nreferences = 'b'", "data.references names the column 'b'"),
        ("[data]\ncolumns = ['a']\npublic_text = '{b}'", "data.public_text names the column 'b'"),
        ("[data]\ncolumns = ['a']\nlabels = ['1', 1]", "data.labels names a label twice"),
        ("[data]\ntext = '{a:>9}'", "format specification"),
        ("[data]\npublic_text = '{a!r}'", "conversion"),
        ("[policy]\nmodel_digests = { a = 'x' }", "'a' is not listed in policy.base_models"),
        ("[policy]\nbase_models = ['/a']\nmodel_digests = { '/a' = 'x' }", "must be a SHA-256"),
        ("[policy]\nleast_examples = 0", "policy.least_examples = 0"),
    ],
)
def test_a_bad_site_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "site.toml").write_text(text)
    with pytest.raises(DeploymentError, match=message) as refused:
        load_site(tmp_path / "site.toml")
    assert len(str(refused.value).splitlines()) == 1


def test_site_check_shows_what_the_server_would_see(command: Any, tmp_path: Path) -> None:
    rows = [{**row, "ssn": "1"} for row in make_rows(60, 0)]
    write_jsonl(tmp_path / "rows.jsonl", [*rows, {**rows[0], "label": "rare"}])
    file = tmp_path / "site.toml"
    file.write_text(f"[data]\n{DATA}")
    said = command("site", "check", "--data", file)
    assert said.code == 2
    assert 'labels = ["animal", "food", "place", "rare"]' in said.error.replace("\n", " ").replace("  ", " ")
    file.write_text(f'[data]\n{DATA}labels = ["animal", "food", "place", "rare"]\n')
    said = command("site", "check", "--data", file)
    assert said.code == 0
    for line in (
        "columns that are read: text, label",
        "rows: 61 train, 0 development, 0 test",
        "labels that the server is told: animal, food, place, rare",
        "labels whose sums are withheld: 1 (policy.least_label_examples = 5)",
        "updates may leave",
        "vectors stay here",
    ):
        assert line in said.out
    file.write_text(f'[data]\n{DATA}labels = ["animal", "food"]\n')
    said = command("site", "check", "--data", file)
    assert (said.code, "is not among data.labels" in said.error.replace("\n", " ")) == (2, True)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": {"name": "retrieval"}, "rounds": {"count": 1},
         "data": {"task": "retrieval", "prompt": "{q}", "target": "{a}"}},
        {"data": {"task": "generation", "references": "r"}, "model": {"base": "builtin:lm-small"}},
    ],
)  # fmt: skip
def test_the_prepared_file_is_complete_and_chooses_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    recipe = resolved(load_recipe(changes))
    text = site_template(recipe)
    (tmp_path / "site.toml").write_text(text)
    settings = load_site(tmp_path / "site.toml")
    assert settings.policy == PolicySettings()
    assert settings.data.columns == list(
        {"classification": ["text", "label"], "retrieval": ["q", "a"]}.get(
            recipe.data.task, ["source", "target", "r"]
        )
    )
    (tmp_path / "site.toml").write_text(text.replace("# sums = true", "sums = true"))
    assert load_site(tmp_path / "site.toml").policy.sums == ("# sums = true" in text)
    assert ("# vectors = true" in text) == (recipe.data.task == "retrieval")


def test_a_check_says_when_there_is_nothing_to_train_on(command: Any, tmp_path: Path) -> None:
    file = tmp_path / "site.toml"
    file.write_text('[data]\ncolumns = ["text", "label"]\ntext = "{text}"\nlabel = "label"\nmax_labels = 3\n')
    said = command("site", "check", "--data", file)
    assert said.code == 0, said.error
    assert "no training rows: data.train is not set" in " ".join(said.out.split())
    file.write_text(file.read_text() + 'train = "rows.csv"\n')
    said = command("site", "check", "--data", file)
    assert said.code == 2
    assert "data.train = 'rows.csv': no such file" in " ".join(said.error.split())
