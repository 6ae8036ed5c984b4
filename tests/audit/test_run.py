"""The audit of a whole run: which rounds, what is written, and what is said where something is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fedcustom
from fedcustom.audit.attack import UNSEEN
from fedcustom.audit.results import Audit, read_audit
from fedcustom.audit.run import audit_run, rounds_to_attack, run_to_audit
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


@pytest.mark.parametrize("hidden", [False, True])
def test_of_secure_sums_the_sum_alone_is_attacked(
    small: dict[str, Any], tmp_path: Path, hidden: bool
) -> None:
    """What a client sends on its own is not what the server sees; rows that are hidden too are recorded."""
    recipe = {
        **small,
        "clients": {"partition": "iid", "count": 20},
        "method": {"name": "bitfit" if hidden else "full"},
        "rounds": {"count": 2, "clients_per_round": 4},
        "training": {"batch_size": 8, "fit_head": False, "logit_adjustment": 0},
        "aggregation": {"weighting": "uniform"},
        "secure_sum": {"on": True},
        **({"privacy": {"unit": "example", "epsilon": 8.0, "delta": 1e-3}} if hidden else {}),
    }
    directory = tmp_path / "run"
    run_to_audit(load_recipe(recipe), directory)
    found = audit_run(directory, attacks=["tokens", "candidates", "inversion"], minutes=5)
    assert {f.view for f in found.findings} == {"sum of clients", "state difference"}
    sums = {(f.attack, f.round, f.measure): f for f in found.findings if f.view == "sum of clients"}
    assert {(attack, number) for attack, number, _ in sums} >= {("candidates", 1), ("candidates", 2)}
    reasons = {(left.attack, left.round): left.reason for left in found.not_run}
    assert reasons["candidates", 1] == f"a client's update: {UNSEEN}"
    assert reasons["inversion", None] == UNSEEN
    if hidden:
        epsilon = {f.view: f.epsilon for f in found.findings if f.measure == "AUC" and f.round == 1}
        assert epsilon["state difference"] is None
        assert epsilon["sum of clients"] is not None
        assert found.broken == []
    else:
        exact = sums["tokens", 1, "exact set of tokens"]
        assert (exact.success, exact.trials) == (1.0, 1)
        assert "of the sum of 4 clients the set of tokens is read exactly" in exact.meaning
