"""Hundreds of clients with one to three rows, end to end with the defaults."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import fedcustom
from fedcustom.cli.progress_bar import ProgressDisplay
from fedcustom.data.build import build_data
from fedcustom.data.examples import ClientData, Example, FederatedData, LearningTask
from fedcustom.federated.resolve import resolved
from fedcustom.federated.schedule import Plan, plan_rounds
from fedcustom.recipe.recipe import load_recipe
from helpers.rows import make_rows, write_jsonl
from helpers.runs import rows_of, tensors_of

CLIENTS, ROUNDS = 400, 6
SCRIPT = Path(__file__).parents[2] / "scripts" / "many_clients.py"


@pytest.fixture(scope="module")
def authors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script's own file, of this project's made-up rows."""
    folder = tmp_path_factory.mktemp("authors")
    source = write_jsonl(folder / "source.jsonl", make_rows(160, 0))
    out = folder / "many.jsonl"
    command = [sys.executable, str(SCRIPT), str(source), str(out), "--clients", str(CLIENTS)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert done.stdout == f"{out}: {len(rows)} rows of {CLIENTS} authors\n"
    sizes = Counter(row["author"] for row in rows)
    assert len(sizes) == CLIENTS
    assert set(sizes.values()) == {1, 2, 3}
    assert sum(count == 1 for count in sizes.values()) > CLIENTS / 2
    return out


@pytest.fixture
def many(small: dict[str, Any], authors: Path) -> dict[str, Any]:
    """A recipe that says neither how many clients take part in a round nor how many fit the head."""
    clients = {"partition": "natural", "column": "author"}
    data = {"source": str(authors), "max_length": 24}
    method = {
        "name": "prefix",
        "kind": "kv",
        "length": 4,
    }  # whose head takes all the steps that are announced
    return {**small, "method": method, "data": data, "clients": clients, "rounds": {"count": ROUNDS}}


class Interrupted(Exception):
    pass


class Stopping(ProgressDisplay):
    """Stops a run after its third round."""

    def on_round_end(self, row: dict[str, Any]) -> None:
        super().on_round_end(row)
        if row["round"] == 3:
            raise Interrupted


def test_a_run_of_many_clients(many: dict[str, Any], tmp_path: Path) -> None:
    """It asks no client more than planned, says beforehand what it asks, and does so after a stop, too."""
    written = StringIO()
    run = fedcustom.run(
        many, out=tmp_path / "run", callbacks=[ProgressDisplay(Console(file=written, width=300))]
    )
    recipe = resolved(load_recipe(many))
    data = build_data(recipe.data, recipe.clients, recipe.seed)
    planned = plan_rounds(recipe.settled(CLIENTS), data)
    rows = rows_of(run.directory)[1:]
    assert [len(row["cohort"]) for row in rows] == [150, 50, 50, 50, 50, 150]
    assert [set(row["cohort"]) for row in rows] == [set(cohort) for cohort in planned]
    for row in rows:
        assert set(row["bytes_up"]) == set(row["bytes_down"]) == set(row["answered"]) == set(row["cohort"])

    lines, sent = written.getvalue().splitlines(), run.summary["bytes"]
    examples = sum(len(client.train) for client in data.clients.values())
    (said,) = [line for line in lines if f"{CLIENTS} clients with {examples} training examples" in line]
    assert "; 6 rounds of 50 clients (the default where there are more; rounds.clients_per_round " in said
    assert lines.index(said) < next(i for i, line in enumerate(lines) if ": round 0/6" in line)
    assert any(
        "150 clients fit the head in rounds 1, 6, and it rests otherwise; logits" in line for line in lines
    )
    expected = re.search(r"about ([0-9.]+) MB in all", said)
    assert expected is not None
    assert float(expected[1]) == pytest.approx((sent["up_total"] + sent["down_total"]) / 1e6, rel=0.01)
    trained = 4 * (run.summary["trainable_parameters"] + run.summary["head_parameters"])
    assert sent["up_per_client_round"] < trained + 600
    assert sent["down_per_client_round"] < trained + 600

    with pytest.raises(Interrupted):
        fedcustom.run(many, out=tmp_path / "half", callbacks=[Stopping(Console(file=StringIO()))])
    again = fedcustom.run(many, out=tmp_path / "half", resume=True)
    assert [row["cohort"] for row in rows_of(again.directory)[1:]] == [row["cohort"] for row in rows]
    ours, theirs = tensors_of(run.directory), tensors_of(again.directory)
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_a_centralised_run_sees_as_many_examples_as_the_cohorts(many: dict[str, Any], tmp_path: Path) -> None:
    only_trains = {"baseline": "centralised", "training.fit_head_rounds": []}
    run = fedcustom.run(many, only_trains, out=tmp_path / "run")
    recipe = resolved(load_recipe(many, {"training.fit_head_rounds": []}))
    data = build_data(recipe.data, recipe.clients, recipe.seed)
    planned = plan_rounds(recipe, data)
    assert [len(cohort) for cohort in planned] == ROUNDS * [50]
    seen = [row["examples"] for row in rows_of(run.directory)[1:]]
    assert seen == [sum(len(data.clients[name].train) for name in cohort) for cohort in planned]


def plan_of(sizes: list[int], partition: str = "natural", **overrides: Any) -> Plan:
    """A plan for clients with so many rows, ``c0`` first; seven of them fit the head."""
    given = {"clients.partition": partition, "clients.count": len(sizes), "rounds.count": 400}
    given |= {"training.fit_head_rounds": [*range(1, 400)], "training.fit_head_clients": 7, **overrides}
    recipe = load_recipe({}, given)
    clients = {f"c{i}": ClientData(f"c{i}", [Example("", label=0)] * rows) for i, rows in enumerate(sizes)}
    return plan_rounds(
        recipe, FederatedData(LearningTask("classification", ("a", "b")), clients, [], [], True)
    )


def test_natural_clients_are_drawn_to_fit_the_head_by_their_sizes() -> None:
    """Of 100 clients of one row and ten of 30 rows, the large ones are most of the seven; where sizes are not
    known, and in a partition, all are alike.
    """
    sizes = 10 * [30] + 100 * [1]

    def large(plan: Plan) -> float:
        return float(np.mean([sum(int(name[1:]) < 10 for name in cohort) for cohort in plan[:-1]]))

    assert all(len(cohort) == 7 for cohort in plan_of(sizes)[:-1])
    generator = np.random.default_rng(1)
    expected = []  # one client after the other, each in proportion to its rows
    for _ in range(2000):
        left = np.array(sizes, dtype=float)
        for _ in range(7):
            left[generator.choice(110, p=left / left.sum())] = 0
        expected.append(10 - np.count_nonzero(left[:10]))
    assert large(plan_of(sizes)) == pytest.approx(np.mean(expected), abs=0.25)
    for plan in (plan_of(sizes, "iid"), plan_of(110 * [0])):
        assert large(plan) == pytest.approx(7 * 10 / 110, abs=0.15)


def test_a_buffer_works_with_as_many_clients_as_a_round_has_by_default() -> None:
    overrides = {"participation.buffer": 1, "training.fit_head_rounds": [], "training.fit_head_clients": None}
    plan = plan_of(200 * [1], **overrides)
    begun_at_once = {name for cohort in plan for name, a in cohort.items() if a.since == 0}
    assert len(begun_at_once) == 50
