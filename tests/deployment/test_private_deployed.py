"""Private runs over the real engine: sites that hide rows, and sites that hide themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.deployed import bed, metrics
from helpers.rows import make_rows
from helpers.site_recipes import dealt_recipe, written

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("deployment")]

CASES: dict[str, dict[str, Any]] = {
    "example": {"privacy": {"unit": "example", "epsilon": 8.0, "delta": 1e-3}},
    "client, in secure sums": {
        "privacy": {"unit": "client", "noise": "sum", "epsilon": 8.0, "delta": 1e-2},
        "secure_sum": {"on": True},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_private_run(tiny: dict[str, str], tmp_path: Path, case: str) -> None:
    """It ends with what was promised, each site counts what it spends, and no figure of its data leaves."""
    recipe = dealt_recipe(
        tiny["bert"],
        written(tmp_path / "rows", make_rows(120, 0), make_rows(20, 2)),
        3,
        training={"batch_size": 8, "local_steps": 2, "learning_rate": 0.1},
        rounds={"count": 2},
        evaluation={"batch_size": 16, "untuned": False},
        **CASES[case],
    )
    with bed(tmp_path / "federation", recipe) as made:
        summary = made.run(tmp_path / "run")
        audits = [made.audit(name) for name in made.names]
        ledgers = [json.loads((made.own(name) / "ledger.json").read_text()) for name in made.names]
    assert summary["privacy"]["epsilon"] == 8.0
    rows = [row for row in metrics(tmp_path / "run") if row["round"]]
    assert [row["answered"] for row in rows] == [made.names] * 2
    assert all(row.get("train_loss") is None for row in rows)
    unit = recipe["privacy"]["unit"]
    for audit, ledger in zip(audits, ledgers, strict=True):
        ((release,),) = (run["releases"] for run in ledger["runs"].values())
        # A row is hidden at each of two steps a round, a site once a round.
        assert (release["unit"], release["steps"]) == (unit, 4 if unit == "example" else 2)
        assert release["noise_multiplier"] > 0
        work = [event for event in audit if event["event"] == "sent" and event["kind"] == "work"]
        assert len(work) == 2
        if unit == "client":
            assert [event["keys"] for event in work] == [["message"]] * 2
