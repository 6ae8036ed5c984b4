"""The audit of a whole run: which rounds, what is written, and what is said where something is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fedcustom
from fedcustom.audit.results import Audit, read_audit
from fedcustom.audit.run import audit_run, rounds_to_attack
from fedcustom.core.errors import RunError
from fedcustom.recipe.recipe import load_recipe


def test_every_kind_of_round_is_attacked(small: dict[str, Any], tmp_path: Path) -> None:
    recipe = {
        **small,
        "clients": {"partition": "iid", "count": 20},
        "method": {"name": "full"},
        "rounds": {"count": 3, "clients_per_round": 4},
        "training": {"batch_size": 8, "fit_head_rounds": [1], "fit_head_steps": 2},
    }
    run = fedcustom.run(recipe, out=tmp_path / "run")
    rounds = ["sums", "tokens", "candidates"]
    found = audit_run(run.directory, attacks=rounds, minutes=5)
    assert isinstance(found, Audit)
    assert {(f.attack, f.round) for f in found.findings} == {
        ("sums", 1), ("tokens", 2), ("tokens", 3), ("candidates", 2), ("candidates", 3),
    }  # fmt: skip
    assert [each.round for each in found.rounds] == [1, 2, 3]
    assert found.rounds[-1].bit_equal
    assert found.not_run == []
    assert (found.promised_epsilon, found.broken) == (None, [])
    exact = {f.round: f.success for f in found.findings if f.measure == "exact set of tokens"}
    assert exact == {2: 1.0, 3: 1.0}
    assert read_audit(run.directory) == found

    again = audit_run(run.directory, attacks=["candidates"], minutes=5)
    assert again.findings == [f for f in found.findings if f.attack == "candidates"]
    assert {f.attack for f in (read_audit(run.directory) or Audit()).findings} == {"candidates"}

    late = audit_run(run.directory, attacks=rounds, minutes=1e-6)
    assert late.findings == []
    assert {(left.attack, left.round) for left in late.not_run} == {
        (f.attack, f.round) for f in found.findings
    }
    assert all("raise --minutes" in left.reason for left in late.not_run)


def test_methods_without_changes_are_said_to_have_none(small: dict[str, Any], tmp_path: Path) -> None:
    run = fedcustom.run({**small, "method": {"name": "probe"}, "rounds": {"count": 1}}, out=tmp_path / "run")
    found = audit_run(run.directory)
    assert {f.attack for f in found.findings} <= {"sums"}
    assert {left.attack for left in found.not_run} >= {"tokens"}


def test_which_rounds() -> None:
    def rounds(count: int, **training: Any) -> list[tuple[int, str]]:
        recipe = {"data": {"source": "x"}, "training": training, "rounds": {"count": count}}
        return [(n, kind[0]) for n, kind in rounds_to_attack(load_recipe(recipe))]

    assert rounds(9, fit_head_rounds=[]) == [(1, "t"), (5, "t"), (9, "t")]
    assert rounds(9, fit_head_rounds=[1, -1]) == [(1, "f"), (2, "t"), (5, "t"), (8, "t"), (9, "f")]
    assert rounds(1, fit_head_rounds=[]) == [(1, "t")]
    assert rounds(2, fit_head_rounds=[]) == [(1, "t"), (2, "t")]


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan"), float("inf")])
def test_minutes(tmp_path: Path, minutes: float) -> None:
    with pytest.raises(RunError, match="must be a positive number"):
        audit_run(tmp_path, minutes=minutes)
