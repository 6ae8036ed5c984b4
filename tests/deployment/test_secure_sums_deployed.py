"""Secure sums across sites with the real engine: the model is the simulation's, also if a site is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fedcustom
from fedcustom.core.tensors import equal
from fedcustom.deployment.site.resident import Resident
from fedcustom.federated.run_directory import Checkpoints
from helpers import deployed
from helpers.deployed import Watcher, bed, hostile, metrics
from helpers.rows import make_rows
from helpers.site_recipes import dealt_recipe, written

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("deployment")]


class Lost(Resident):
    """A site that is silent once its masked vector has left, in round 2."""

    def handle(self, message: dict[str, Any]) -> dict[str, Any]:
        values = message.get("values") or {}
        if message.get("kind") == "secure" and (values.get("stage"), values.get("round")) == ("agree", 2):
            return {"error": "lost"}
        return super().handle(message)


def test_four_sites_of_which_one_is_lost_after_masking(
    tiny: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dealt_recipe(
        tiny["bert"],
        written(tmp_path / "rows", make_rows(120, 0), make_rows(30, 2)),
        4,
        training={"batch_size": 8, "cohort_width": 1, "local_steps": 2},
        rounds={"count": 3},
        evaluation={"batch_size": 16},
        secure_sum={"on": True, "most_examples": 40},
    )
    fedcustom.run(recipe, out=str(tmp_path / "simulated"))
    monkeypatch.setattr(deployed, "Hostile", Lost)
    monkeypatch.setattr(Lost, "tricks", {}, raising=False)
    with bed(tmp_path / "federation", recipe, start=False) as made:
        name = made.names[-1]
        made.start(*made.names[:-1])
        watcher = Watcher()
        with hostile(made, name, {}):
            made.run(tmp_path / "deployed", watcher)
        for site in made.names[:-1]:
            sent = [event for event in made.audit(site) if event["event"] == "sent"]
            assert [event.get("exchange") for event in sent if event["kind"] == "secure"] == [
                "keys", "shares", "agree", "unmask",
            ] * 3  # fmt: skip
            assert [event["keys"] for event in sent if event["kind"] == "work"] == [["message"]] * 3
    assert any(f"{name} was lost after its change was summed" in note for note in watcher.notes)
    assert [row["answered"] for row in metrics(tmp_path / "deployed") if row["round"]] == [made.names] * 3
    states = [
        Checkpoints(tmp_path / out / "checkpoints").load(3).state.tensors for out in ("simulated", "deployed")
    ]
    assert equal(*states)


def test_four_sites_that_fit_a_head(tiny: dict[str, str], tmp_path: Path) -> None:
    recipe = dealt_recipe(
        tiny["bert"],
        written(tmp_path / "rows", make_rows(120, 0), make_rows(30, 2)),
        4,
        method={"name": "probe"},
        training={"cohort_width": 1, "fit_head_steps": 3},
        evaluation={"batch_size": 16, "select": "last"},
        secure_sum={"on": True},
    )
    fedcustom.run(recipe, out=str(tmp_path / "simulated"))
    with bed(tmp_path / "federation", recipe) as made:
        made.run(tmp_path / "deployed")
        sent = [event for event in made.audit(made.names[0]) if event["event"] == "sent"]
        works = [event for event in sent if event["kind"] == "work"]
        assert [event["task"] for event in works] == [
            "count labels", "sum vectors", "sum losses", *["sum gradients"] * 3,
        ]  # fmt: skip
        assert all(event["keys"] == ["message"] for event in works)
    states = [
        Checkpoints(tmp_path / out / "checkpoints").load(1).state.tensors for out in ("simulated", "deployed")
    ]
    assert equal(*states)
