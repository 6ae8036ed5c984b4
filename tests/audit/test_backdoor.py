"""The backdoor of a recipe's hostile clients, in the model that is released."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fedcustom
from fedcustom.audit.attack import CannotAttack, Deadline, OutOfTime, RoundView
from fedcustom.audit.backdoor import Backdoor
from fedcustom.audit.run import audit_run
from helpers.audit import LATER, examples, target

TRIGGER: dict[str, Any] = {"kind": "backdoor", "trigger": "zz", "target": "food"}


def test_success_is_that_of_the_run_itself(small: dict[str, Any], tmp_path: Path) -> None:
    """Of which the summary says how often the target is said with the trigger and without."""
    hostile = {**TRIGGER, "fraction": 0.5, "poisoned_share": 1.0}
    training = {"batch_size": 8, "learning_rate": 0.1}
    recipe = {**small, "attack": hostile, "training": training, "rounds": {"count": 4}}
    run = fedcustom.run(recipe, out=tmp_path / "run")
    found = audit_run(run.directory, attacks=["backdoor"], minutes=5)
    assert found.not_run == []
    by_measure = {f.measure: f for f in found.findings}
    said = run.summary["backdoor"]
    success = by_measure["target said with the trigger"]
    without = by_measure["target said without the trigger"]
    assert success.success == pytest.approx(said["success_rate"])
    assert without.success == pytest.approx(said["without_trigger"])
    assert (success.chance, without.chance) == (without.success, None)
    assert success.view == "released model"
    assert success.low is not None
    assert success.high is not None
    assert success.low <= success.success <= success.high
    assert "'food'" in success.meaning
    assert "'zz'" in success.meaning


@pytest.mark.parametrize("kind", ["none", "sign_flip", "label_flip"])
def test_runs_without_a_backdoor(tiny: dict[str, str], kind: str) -> None:
    run = target(tiny["bert"], "lora", recipe={"attack": {"kind": kind}})
    assert Backdoor().inapplicable(run) == f"no client trains a backdoor (attack.kind = {kind!r})"


def test_no_text_of_another_label(tiny: dict[str, str]) -> None:
    run = target(tiny["bert"], "lora", recipe={"attack": TRIGGER})
    assert Backdoor().inapplicable(run) is None
    state = run.method.initialise()
    view = RoundView(0, "finished", state, state, [])
    with pytest.raises(CannotAttack, match="no text of another label"):
        Backdoor().attack(run, view, LATER)
    data = replace(run.data, test=examples(30))
    with pytest.raises(OutOfTime):
        Backdoor().attack(replace(run, data=data), view, Deadline(0.0))
    found = Backdoor().attack(replace(run, data=data), view, LATER)
    assert {f.trials for f in found} == {sum(e.label != 1 for e in data.test)}


def test_parts_that_clients_keep(tiny: dict[str, str]) -> None:
    run = target(tiny["bert"], "lora", recipe={"attack": TRIGGER})
    method: Any = run.method
    method.ownership.personal = frozenset({"head"})
    assert "keep parts" in (Backdoor().inapplicable(run) or "")
