"""Runs whose clients are hidden: the record, the key, and a run that is resumed."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

import fedcustom
from fedcustom.core.errors import RecipeError, RunError
from fedcustom.core.tensors import equal
from fedcustom.federated.norm_gate import NORMS
from fedcustom.federated.private_run import KEY, RECORD, planned
from fedcustom.federated.run_directory import Checkpoints
from fedcustom.privacy.accounting import gaussian_epsilon
from fedcustom.recipe.recipe import load_recipe
from fedcustom.report import write_report
from helpers.runs import StopAt, rows_of, without_seconds


@pytest.fixture
def private(small: dict[str, Any]) -> dict[str, Any]:
    """Five rounds of two of four clients, each in turn."""
    return {
        **small,
        "training": {"batch_size": 8, "learning_rate": 0.1},
        "aggregation": {"server_optimizer": "fedavgm"},
        "rounds": {"count": 5, "clients_per_round": 2},
        "evaluation": {"batch_size": 32, "untuned": False},
        "privacy": {"unit": "client", "noise_multiplier": 0.5, "delta": 1e-3},
    }


def last_state(run: fedcustom.Run, number: int = 5) -> dict[str, Any]:
    state = Checkpoints(run.directory / "checkpoints").load(number).state
    return {**state.tensors, **state.server}


def stopped(recipe: dict[str, Any], out: Path, number: int) -> None:
    with pytest.raises(RuntimeError, match="stopped"):
        fedcustom.run(recipe, out=out, callbacks=[StopAt(number)])


def test_the_record_and_what_was_spent(private: dict[str, Any], tmp_path: Path) -> None:
    run = fedcustom.run(private, out=tmp_path / "run")
    record = json.loads((tmp_path / "run" / RECORD).read_text())
    promised = gaussian_epsilon((3**0.5) / 0.5, 1e-3)  # three turns at most
    assert record["epsilon"] == pytest.approx(promised)
    assert (record["unit"], record["delta"], record["valid"]) == ("client", 1e-3, True)
    assert record["never_promised"]
    rows = rows_of(run.directory)
    expected = [gaussian_epsilon((turns**0.5) / 0.5, 1e-3) for turns in (1, 1, 2, 2, 3)]
    assert [row["epsilon"] for row in rows] == pytest.approx(expected, abs=1e-5)
    cohorts = [set(row["cohort"]) for row in rows]
    assert cohorts[0] == cohorts[2] == cohorts[4]
    assert cohorts[1] == cohorts[3]
    assert not cohorts[0] & cohorts[1]
    assert not (tmp_path / "run" / KEY).exists()
    assert run.summary["privacy"] == {key: record[key] for key in ("unit", "epsilon", "delta", "valid")}
    page = write_report([run.directory], tmp_path / "report.html").read_text()
    assert f"{rows[-1]['epsilon']:.2f} (round 5)" in page


@pytest.mark.parametrize("at", [1, 3, 4])
def test_a_resumed_run_goes_on_bit_by_bit(private: dict[str, Any], tmp_path: Path, at: int) -> None:
    """With a seeded key the whole run can be compared; the secret one is the same but for the file."""
    private["privacy"] = {**private["privacy"], "randomness": "seeded"}
    whole = fedcustom.run(private, out=tmp_path / "whole")
    stopped(private, tmp_path / "parts", at)
    parts = fedcustom.run(private, out=tmp_path / "parts", resume=True)
    assert equal(last_state(whole), last_state(parts))
    assert [without_seconds(row) for row in rows_of(whole.directory)] == [
        without_seconds(row) for row in rows_of(parts.directory)
    ]
    assert not json.loads((tmp_path / "parts" / RECORD).read_text())["valid"]
    assert not (tmp_path / "parts" / KEY).exists()


def test_a_secret_key_lasts_as_long_as_the_run(private: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    stopped(private, out, 2)
    key = out / KEY
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    first = key.read_bytes()
    with pytest.raises(RuntimeError, match="stopped"):
        fedcustom.run(private, out=out, resume=True, callbacks=[StopAt(4)])
    assert key.read_bytes() == first
    # The same key, put into another stopped run of the recipe, gives the same states: nothing else is random.
    other = tmp_path / "other"
    stopped(private, other, 1)
    (other / KEY).write_bytes(first)
    for number in sorted(Checkpoints(other / "checkpoints").rounds()):
        assert number == 1
    one = fedcustom.run(private, out=out, resume=True)
    assert not key.exists()
    assert one.summary["metrics"]
    for path in out.rglob("*"):
        assert path.is_dir() or first not in path.read_bytes()


def test_two_runs_have_other_noise(private: dict[str, Any], tmp_path: Path) -> None:
    one, other = (fedcustom.run(private, out=tmp_path / name) for name in ("one", "other"))
    assert not equal(last_state(one), last_state(other))


def test_without_its_key_a_run_is_not_resumed(private: dict[str, Any], tmp_path: Path) -> None:
    stopped(private, tmp_path / "run", 2)
    key = tmp_path / "run" / KEY
    content = key.read_bytes()
    key.chmod(0o640)
    with pytest.raises(RunError, match="mode 640"):
        fedcustom.run(private, out=tmp_path / "run", resume=True)
    key.write_bytes(content[:-1])
    key.chmod(0o600)
    with pytest.raises(RunError, match="damaged"):
        fedcustom.run(private, out=tmp_path / "run", resume=True)
    key.unlink()
    with pytest.raises(RunError, match="gone"):
        fedcustom.run(private, out=tmp_path / "run", resume=True)


def test_a_run_that_was_stopped_after_its_last_round_needs_no_key(
    private: dict[str, Any], tmp_path: Path
) -> None:
    stopped(private, tmp_path / "run", 5)
    (tmp_path / "run" / KEY).unlink(missing_ok=True)
    assert fedcustom.run(private, out=tmp_path / "run", resume=True).summary["metrics"]


def test_no_client_is_left_out_by_what_others_send(private: dict[str, Any], tmp_path: Path) -> None:
    """A change of any length is bounded: the norm gate would make one client's part depend on others."""
    private["attack"] = {"kind": "sign_flip", "fraction": 0.25, "scale": 1e4}
    run = fedcustom.run(private, out=tmp_path / "run")
    rows = rows_of(run.directory)
    assert not any(row["left_out"] for row in rows)
    assert max(norm for row in rows for norm in row[NORMS].values()) > 1e3


def test_absent_clients_are_zeros(private: dict[str, Any], tmp_path: Path) -> None:
    private["participation"] = {"dropout": 0.5}
    assert fedcustom.run(private, out=tmp_path / "run").summary["metrics"]


@pytest.mark.parametrize(
    ("privacy", "key"),
    [
        ({"delta": 0.03}, "privacy.delta"),
        ({"bands": 3}, "privacy.bands"),
        ({"clip": "adaptive"}, "privacy.clip"),
        ({"participation": "poisson"}, "rounds.clients_per_round"),
    ],
)
def test_what_depends_on_the_number_of_clients_is_refused_before_the_model_is_loaded(
    private: dict[str, Any], tmp_path: Path, privacy: dict[str, Any], key: str
) -> None:
    private["privacy"] = {**private["privacy"], **privacy}
    private["model"] = {**private["model"], "dtype": "float32"}
    with pytest.raises(RecipeError, match=key):
        fedcustom.run(private, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_schedule_and_momentum_shape_the_noise() -> None:
    recipe = load_recipe(
        {
            "clients": {"partition": "iid", "count": 1000},
            "rounds": {"count": 80, "clients_per_round": 100},
            "training": {"schedule": "linear", "learning_rate": 0.1},
            "aggregation": {"server_optimizer": "fedavgm", "momentum": 0.9},
            "privacy": {"unit": "client", "epsilon": 8.0, "delta": 1e-5},
        }
    )
    found = planned(recipe, 1000)
    assert found is not None
    assert found.last_state_noise == pytest.approx(0.583, abs=1e-3)
    assert planned(load_recipe({}), 10) is None


@pytest.mark.parametrize(
    "privacy",
    [
        {"participation": "poisson"},
        {"participation": "poisson", "clip": "adaptive", "clip_head": "adaptive"},
        {"clip": 1e-3, "clip_head": 0.1},
    ],
)
def test_poisson_rounds_and_other_bounds(
    private: dict[str, Any], tmp_path: Path, privacy: dict[str, Any]
) -> None:
    private["clients"] = {"partition": "iid", "count": 50, "minimum_examples": 1}
    private["clients"] |= {"development_fraction": 0.3, "test_fraction": 0.0}
    private["rounds"] = {"count": 3, "clients_per_round": 40}
    private["privacy"] = {"unit": "client", "noise_multiplier": 0.5, "delta": 1e-3, **privacy}
    run = fedcustom.run(private, out=tmp_path / "run")
    rows = rows_of(run.directory)
    sizes = {len(row["cohort"]) for row in rows}
    if "participation" in privacy:
        assert len(sizes) > 1  # not of a fixed size
    assert rows[0]["epsilon"] <= rows[1]["epsilon"] <= rows[2]["epsilon"]
    assert rows[2]["epsilon"] == pytest.approx(run.summary["privacy"]["epsilon"], abs=1e-5)
    values = Checkpoints(run.directory / "checkpoints").load(3).state.values
    adaptive = privacy.get("clip") == "adaptive"
    assert [key for key in values if key.startswith("bound/")] == (
        ["bound/own", "bound/head"] if adaptive else []
    )


def test_a_run_may_begin_with_a_noised_head(private: dict[str, Any], tmp_path: Path, sentence: str) -> None:
    private["model"] = {"base": sentence}
    private["training"] |= {"fit_head_rounds": [1]}
    private["rounds"] = {"count": 4, "clients_per_round": 2}
    stopped(private, tmp_path / "run", 2)
    run = fedcustom.run(private, out=tmp_path / "run", resume=True)
    rows = rows_of(run.directory)
    assert "noised sums of 4 clients" in rows[0]["method"]["head"]
    mu = 2**0.5 / 0.5  # two turns of training
    share = 0.13 / 0.87 * mu**2
    expected = [share, share + mu**2 / 2, share + mu**2 / 2, share + mu**2]
    assert [row["epsilon"] for row in rows] == pytest.approx(
        [gaussian_epsilon(squared**0.5, 1e-3) for squared in expected], abs=1e-5
    )
    record = json.loads((tmp_path / "run" / RECORD).read_text())
    assert record["head"]["fits"] == 1


@pytest.mark.parametrize(
    "sections",
    [
        {"compression": {"kind": "int8"}},
        {"compression": {"kind": "top_k", "error_feedback": True}},
        {"method": {"name": "lora", "variant": "fedsa", "rank": 2}},
        {"method": {"name": "lora", "variant": "rolora", "rank": 2}},
        {"personalisation": {"keep": ["head"]}},
        {"aggregation": {"server_optimizer": "fedadam"}, "training": {"learning_rate": 0.1, "proximal": 0.1}},
        {"rounds": {"count": 1}, "method": {"name": "bitfit", "norms": True}},
        {"participation": {"partial": 0.5}},
    ],
    ids=str,
)
def test_what_goes_with_it(private: dict[str, Any], tmp_path: Path, sections: dict[str, Any]) -> None:
    private["rounds"] = {"count": 2, "clients_per_round": 2}
    run = fedcustom.run({**private, **sections}, out=tmp_path / "run")
    rows = rows_of(run.directory)
    assert not any(row["left_out"] for row in rows)
    assert not any("refused" in row for row in rows)
    assert rows[-1]["epsilon"] == pytest.approx(run.summary["privacy"]["epsilon"], abs=1e-5)


def test_clients_that_noise_what_they_send(private: dict[str, Any], tmp_path: Path) -> None:
    """For themselves: with an exact curve, without their losses, and bit by bit after a resumption."""
    private["privacy"] |= {"noise": "client", "randomness": "seeded", "accept_noise": True}
    whole = fedcustom.run(private, out=tmp_path / "whole")
    stopped(private, tmp_path / "parts", 3)
    assert equal(last_state(whole), last_state(fedcustom.run(private, out=tmp_path / "parts", resume=True)))
    rows = rows_of(whole.directory)
    expected = [gaussian_epsilon((turns**0.5) / 0.5, 1e-3) for turns in (1, 1, 2, 2, 3)]
    assert [row["epsilon"] for row in rows] == pytest.approx(expected, abs=1e-5)
    assert not any(row["left_out"] for row in rows)
    assert all(row["train_loss"] is None for row in rows)
    record = json.loads((whole.directory / RECORD).read_text())
    assert (record["noise"], record["against"][0]) == (
        "client",
        "the server, whether or not it follows the protocol",
    )
    private["privacy"] |= {"randomness": "secret"}
    out = tmp_path / "secret"
    stopped(private, out, 1)
    assert (out / KEY).exists()
    fedcustom.run(private, out=out, resume=True)
    assert not (out / KEY).exists()


def test_the_number_of_clients_that_add_the_noise_stays(private: dict[str, Any], tmp_path: Path) -> None:
    private["privacy"] |= {"noise": "client", "accept_noise": True}
    stopped(private, tmp_path / "run", 1)
    record = json.loads((tmp_path / "run" / RECORD).read_text())
    record["participation"]["clients"] = 5
    (tmp_path / "run" / RECORD).write_text(json.dumps(record))
    with pytest.raises(RunError, match="began with 5 clients, who add the noise, and there are 4"):
        fedcustom.run(private, out=tmp_path / "run", resume=True)


def test_noise_that_drowns_a_change_has_to_be_accepted(private: dict[str, Any], tmp_path: Path) -> None:
    private["privacy"] |= {"noise": "client", "noise_multiplier": 30.0}
    with pytest.raises(RecipeError, match=r"privacy\.noise = 'client'.*times as long.*privacy\.accept_noise"):
        fedcustom.run(private, out=tmp_path / "run")


def test_a_generator_has_no_head_to_bound(generation: dict[str, Any], tmp_path: Path) -> None:
    recipe = {
        **generation,
        "rounds": {"count": 1},
        "privacy": {"unit": "client", "noise_multiplier": 0.5, "delta": 1e-3},
    }
    assert fedcustom.run(recipe, out=tmp_path / "run").summary["privacy"]["valid"]


@pytest.mark.parametrize(
    ("noise", "sections"),
    [
        ("sum", {"method": {"name": "lora", "variant": "rolora", "rank": 2}}),
        ("sum", {"personalisation": {"keep": ["head"]}, "aggregation": {"server_optimizer": "fedadam"}}),
        ("sum", {"participation": {"partial": 0.5, "dropout": 0.2}}),
        ("client", {"method": {"name": "lora", "variant": "fedsa", "rank": 2}}),
        ("client", {"compression": {"kind": "int8"}}),
    ],
    ids=str,
)
def test_what_goes_with_noise_of_clients(
    private: dict[str, Any], tmp_path: Path, noise: str, sections: dict[str, Any]
) -> None:
    """Where clients drop out at random, those that are left may be too few for a sum: then none is opened."""
    private["rounds"] = {"count": 2, "min_clients": 3}
    private["secure_sum"] = {"on": noise == "sum"}
    private["privacy"] |= {"noise": noise} | ({"accept_noise": True} if noise == "client" else {})
    run = fedcustom.run({**private, **sections}, out=tmp_path / "run")
    rows = rows_of(run.directory)
    assert all(len(row["answered"]) >= 3 for row in rows)
    assert not any("refused" in row for row in rows)
    assert rows[-1]["epsilon"] == pytest.approx(run.summary["privacy"]["epsilon"], abs=1e-5)


def test_a_generator_noises_what_is_summed(generation: dict[str, Any], tmp_path: Path) -> None:
    """One group of tensors, of which the least noise is accounted for."""
    recipe = {
        **generation,
        "rounds": {"count": 1},
        "secure_sum": {"on": True},
        "privacy": {"unit": "client", "noise": "sum", "noise_multiplier": 0.5, "delta": 1e-3},
    }
    assert fedcustom.run(recipe, out=tmp_path / "run").summary["privacy"]["valid"]
