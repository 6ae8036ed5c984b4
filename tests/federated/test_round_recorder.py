"""What is kept of a private run, whose rounds cannot be repeated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedcustom.audit.results import Audit
from fedcustom.audit.run import audit_run, run_to_audit
from fedcustom.core.errors import RunError
from fedcustom.core.tensors import equal
from fedcustom.federated.replay import Replay
from fedcustom.federated.round_recorder import FOLDER, RecordedRounds
from fedcustom.federated.run_directory import Checkpoints
from fedcustom.recipe.recipe import load_recipe
from fedcustom.transport.protocol import Reply


@pytest.fixture
def private(small: dict[str, Any]) -> dict[str, Any]:
    """Four rounds of five of twenty clients, with little noise."""
    return {
        **small,
        "clients": {"partition": "iid", "count": 20},
        "training": {"batch_size": 8, "learning_rate": 0.1},
        "rounds": {"count": 4, "clients_per_round": 5},
        "evaluation": {"batch_size": 32, "untuned": False},
        "privacy": {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3},
    }


def nothing(number: int, reply: Reply) -> None:
    """Looks at no message."""


def test_states_of_a_run_that_hides_clients(private: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_to_audit(load_recipe(private), out)
    kept = Checkpoints(out / FOLDER)
    assert kept.rounds() == [1, 2, 3, 4]  # of the rounds 1, 3 and 4
    assert not list((out / FOLDER).glob("messages*"))  # the trusted server's view
    for number in kept.rounds():
        content = json.loads((out / FOLDER / f"round-{number:06d}" / "state.json").read_text())
        assert (content["memories"], content["files"]) == ({}, {})
    with RecordedRounds(out, nothing) as source:
        first, last = source.round(1), source.round(4)
        assert equal(first.before.tensors, source.federation.origin.tensors)
        assert equal(last.after.tensors, Checkpoints(out / "checkpoints").load(4).state.tensors)
        assert source.missing(2) is None
        assert source.federation.private is not None
        record = json.loads((out / "privacy.json").read_text())
        assert source.federation.private.mechanism.noise_multiplier == record["noise_multiplier"]

    found = audit_run(out, minutes=5)
    assert {(f.attack, f.view, f.round) for f in found.findings if f.attack != "membership"} == {
        ("candidates", "state difference", 1),
        ("candidates", "state difference", 3),
        ("candidates", "state difference", 4),
        ("canaries", "state difference", 0),
    }
    assert all(each.recorded for each in found.rounds)
    assert [f.attack for f in found.findings if f.epsilon is not None] == ["candidates", "canaries"]
    assert found.broken == []


def test_what_was_not_kept_is_said(private: dict[str, Any], tmp_path: Path) -> None:
    import fedcustom

    run = fedcustom.run(private, out=tmp_path / "run")
    found = audit_run(run.directory, attacks=["candidates"])
    assert isinstance(found, Audit)
    assert (found.findings, found.rounds) == ([], [])
    assert {left.round for left in found.not_run} == {1, 3, 4}
    assert all("was not kept while the run went" in left.reason for left in found.not_run)
    with RecordedRounds(run.directory, nothing) as source, pytest.raises(RunError, match="round 1: the key"):
        source.round(1)


def test_a_seeded_run_is_repeated(private: dict[str, Any], tmp_path: Path) -> None:
    private["privacy"] |= {"randomness": "seeded"}
    run_to_audit(load_recipe(private), tmp_path / "run")
    assert not (tmp_path / "run" / FOLDER).exists()
    with Replay(tmp_path / "run", nothing) as replay:
        assert replay.round(4).checkpoint


def test_messages_of_clients_that_hide_their_rows(private: dict[str, Any], tmp_path: Path) -> None:
    private["privacy"] = {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-3}
    run_to_audit(load_recipe(private), tmp_path / "run")
    seen: list[tuple[int, Reply]] = []
    with RecordedRounds(tmp_path / "run", lambda number, reply: seen.append((number, reply))) as source:
        round_ = source.round(1)
        assert [number for number, _ in seen] == [1] * 5
        assert source.left_out(1) == 0
        answers = [reply for _, reply in seen]
        assert {reply.client for reply in answers} == set(source.rows[1]["cohort"])
        for reply in answers:
            assert reply.update is not None
            source.federation.method.check(reply.task, reply.update)
            sent = {n: t for n, t in reply.task.tensors.items() if n in round_.before.tensors}
            assert equal(sent, {n: round_.before.tensors[n] for n in sent})
    found = audit_run(tmp_path / "run", attacks=["candidates"], minutes=5)
    assert {(f.view, f.round) for f in found.findings} == {
        (view, n) for view in ("client's update", "state difference") for n in (1, 3, 4)
    }
    assert [(f.view, f.round) for f in found.findings if f.epsilon is not None] == [("client's update", 1)]


@pytest.mark.parametrize("noise", ["client", "sum"])
def test_messages_of_clients_that_hide_themselves(
    private: dict[str, Any], tmp_path: Path, noise: str
) -> None:
    """The server is not trusted, so that the promise covers what it sees: each message, or sums alone."""
    private["rounds"] = {"count": 1, "clients_per_round": 5}
    private["privacy"] |= {"noise": noise}
    private |= {"secure_sum": {"on": True}} if noise == "sum" else {}
    private["privacy"] |= {"accept_noise": True} if noise == "client" else {}
    run_to_audit(load_recipe(private), tmp_path / "run")
    seen: list[Reply] = []
    with RecordedRounds(tmp_path / "run", lambda _, reply: seen.append(reply)) as source:
        source.round(1)
        cohort = tuple(source.rows[1]["cohort"])
    if noise == "sum":
        assert [set(reply.clients) for reply in seen] == [set(cohort)]
    else:
        assert sorted(reply.client for reply in seen) == sorted(cohort)
    found = audit_run(tmp_path / "run", attacks=["candidates"], minutes=5)
    view = "sum of clients" if noise == "sum" else "client's update"
    assert view in {each.view for each in found.findings}
