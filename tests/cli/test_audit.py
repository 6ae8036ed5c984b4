"""``audit``: a run or a recipe, its table, and one line for every mistake."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fedcustom
import fedcustom.audit.run
from fedcustom.audit.results import Audit, Finding, read_audit, write_audit
from fedcustom.recipe.recipe import load_recipe, to_toml


def test_a_recipe_is_run_and_audited(command: Any, small: dict[str, Any], tmp_path: Path) -> None:
    path, out = tmp_path / "small.toml", tmp_path / "run"
    recipe = {**small, "clients": {"partition": "iid", "count": 20}}
    recipe |= {
        "training": {"batch_size": 8, "fit_head": False},
        "rounds": {"count": 2, "clients_per_round": 5},
    }
    path.write_text(to_toml(load_recipe(recipe)))
    said = command("audit", path, "--out", out, "--attacks", "candidates, tokens")
    assert said.code == 0, said.error
    assert "client's update" in said.out
    assert "TPR at 1 % FPR" in said.out
    assert "not made: tokens: the table of input embeddings is not trained" in said.error
    assert "bit-equal" in said.out
    found = read_audit(out)
    assert found is not None
    assert len(found.findings) == 8  # two rounds, two views, two measures
    page = (out / "report.html").read_text()
    assert 'id="audit-heading"' in page
    assert "AUC" in page

    again = command("audit", out, "--attacks", "sums", "--quiet")
    assert again.code == 0, again.error
    assert "no attack was made" in again.out
    assert "not made: sums: no round fits the head to clients' sums" in again.error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none"], "none: no such run or recipe"),
        (["none.toml"], "none.toml: no such run or recipe"),
        (["."], "holds no run (no recipe.toml)"),
        (
            [".", "--attacks", "sum"],
            "--attacks: no attack 'sum'; allowed: sums, tokens, candidates, inversion, backdoor, canaries, "
            "membership",
        ),
        ([".", "--minutes", "0"], "--minutes 0: must be a positive number"),
        ([".", "--minutes", "nan"], "--minutes nan: must be a positive number"),
        ([".", "--out", "x"], "--out: is for a recipe that is run first; . is a run's directory"),
        ([".", "--set", "seed=1"], "--set: is for a recipe that is run first; . is a run's directory"),
        (["empty.toml"], "empty.toml: is empty"),
    ],
)
def test_mistakes(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.toml").write_text("")
    said = command("audit", *words)
    assert (said.code, said.out) == (2, "")
    assert message in " ".join(said.error.split())
    assert said.error.startswith("error: ")


def test_a_broken_promise_fails(
    command: Any, small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fedcustom.run({**small, "rounds": {"count": 1}}, out=tmp_path / "run")
    (run.directory / "privacy.json").write_text('{"epsilon": 1.5, "delta": 1e-6}')
    leak = Finding("candidates", "state difference", 1, "AUC", 0.9, 0.5, 40, 40, "it leaks", epsilon=2.0)

    def found(directory: Path, **options: Any) -> Audit:
        audit = Audit([leak], promised_epsilon=1.5, delta=1e-6)
        write_audit(directory, audit)
        return audit

    monkeypatch.setattr(fedcustom.audit.run, "audit_run", found)
    said = command("audit", run.directory)
    assert said.code == 1
    assert "epsilon is at least 2.00 (95 % confidence, delta = 1e-06), and 1.5 is promised" in " ".join(
        said.error.split()
    )
    assert "Broken promise" in (run.directory / "report.html").read_text()
    leak = replace(leak, epsilon=1.5)
    assert command("audit", run.directory).code == 0


def test_a_malformed_audit_is_named_in_the_report(
    command: Any, small: dict[str, Any], tmp_path: Path
) -> None:
    run = fedcustom.run({**small, "rounds": {"count": 1}}, out=tmp_path / "run")
    (run.directory / "audit.json").write_text(json.dumps({"findings": [{"attack": "<b>"}]}))
    said = command("report", run.directory)
    assert said.code == 2
    assert "audit.json: findings.0.view: Field required" in " ".join(said.error.split())


def test_help_teaches(command: Any) -> None:
    said = command("audit", "--help")
    assert said.code == 0
    text = " ".join(said.out.split())
    assert "fedcustom audit runs/first" in text
    for name in ("sums", "tokens", "candidates", "--minutes"):
        assert name in text
