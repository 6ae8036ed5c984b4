"""``audit.json``: what was written is read back, and what is malformed is named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fedcustom.audit.names import NAMES, check_names
from fedcustom.audit.promise import DELTA, promised_delta, promised_epsilon
from fedcustom.audit.registry import ATTACKS, chosen
from fedcustom.audit.results import Audit, CheckedRound, Finding, NotRun, read_audit, write_audit
from fedcustom.core.errors import RunError

FOUND = Finding(
    "candidates", "state difference", 3, "AUC", 0.91, 0.5, 400, 400, "it leaks", 0.88, 0.94, epsilon=2.5
)
AUDIT = Audit([FOUND], [NotRun("sums", "no head", 1)], [CheckedRound(3, True)], 2.0, 1e-5, 12.5)


def test_it_is_read_back(tmp_path: Path) -> None:
    assert read_audit(tmp_path) is None
    assert write_audit(tmp_path, AUDIT) == tmp_path / "audit.json"
    assert read_audit(tmp_path) == AUDIT
    assert [file.name for file in tmp_path.iterdir()] == ["audit.json"]


def test_a_bound_above_the_promise_breaks_it() -> None:
    assert AUDIT.broken == [FOUND]
    assert Audit([FOUND], promised_epsilon=2.5).broken == []
    assert Audit([FOUND]).broken == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "audit.json: "),
        ('{"findings": [{"attack": "sums"}]}', "findings.0.view: Field required"),
        ('{"findings": {}}', "findings: Input should be a valid "),
        (json.dumps({"rounds": [{"round": "1", "bit_equal": True}]}), "rounds.0.round: "),
    ],
)
def test_what_is_malformed_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "audit.json").write_text(content)
    with pytest.raises(RunError, match=re.escape(message)):
        read_audit(tmp_path)


def test_promises(tmp_path: Path) -> None:
    assert promised_epsilon(tmp_path) is None
    assert promised_delta(tmp_path) == DELTA
    (tmp_path / "privacy.json").write_text('{"unit": "client"}')
    assert promised_epsilon(tmp_path) is None
    (tmp_path / "privacy.json").write_text('{"epsilon": 8, "delta": 1e-6}')
    assert (promised_epsilon(tmp_path), promised_delta(tmp_path)) == (8.0, 1e-6)
    for value in ('"8"', "0", "-1", "true", "Infinity", "NaN"):
        (tmp_path / "privacy.json").write_text(f'{{"epsilon": {value}}}')
        with pytest.raises(RunError, match=r"privacy.json: epsilon = .*: must be a positive number"):
            promised_epsilon(tmp_path)


def test_attacks_by_name() -> None:
    assert tuple(ATTACKS) == NAMES
    assert [attack.name for attack in chosen(["candidates", "sums"])] == ["sums", "candidates"]
    assert len(chosen([])) == len(NAMES)
    with pytest.raises(RunError, match=r"no attack 'candidate'; allowed: .*; did you mean 'candidates'"):
        check_names(["sums", "candidate"])
