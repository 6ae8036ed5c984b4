"""Sites that hide themselves by noise of their own in secure sums: equal to the simulation where keys are,
drop-outs, a site's checks of what it is asked, and a dishonest server.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import fedcustom
from fedcustom.core.errors import DeploymentError, RunError
from fedcustom.core.tensors import equal
from fedcustom.deployment import parties
from fedcustom.federated.private_run import KEY, RECORD
from fedcustom.federated.resolve import resolved
from fedcustom.privacy.sum_noise import SCALE
from fedcustom.recipe.recipe import load_recipe
from helpers.rows import make_rows, write_jsonl
from helpers.runs import StopAt
from helpers.secure_sites import SecureSites, failing, last, rows_of
from helpers.site_recipes import owners_recipe

RUN = "0123456789abcdef"


@pytest.fixture
def recipe(tiny: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    """Prefix-tuning in two rounds with four clients, all in each."""
    privacy = {"unit": "client", "noise": "sum", "epsilon": 8.0, "delta": 1e-2, "randomness": "seeded"}
    return owners_recipe(
        tiny["bert"],
        tmp_path / "rows",
        [row % 4 for row in range(120)],
        training={"batch_size": 8, "cohort_width": 1, "local_steps": 2, "learning_rate": 0.1},
        rounds={"count": 2},
        evaluation={"batch_size": 32, "untuned": False},
        secure_sum={"on": True},
        privacy=privacy,
    )


def secret(recipe: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**recipe, "privacy": {**recipe["privacy"], "randomness": "secret"}, **more}


def test_with_the_same_keys_deployment_and_simulation_are_equal(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    simulated = fedcustom.run(recipe, out=str(tmp_path / "simulated"))
    sites = SecureSites(tmp_path / "sites", recipe)
    sites.run(tmp_path / "deployed")
    assert equal(last(tmp_path / "simulated"), last(tmp_path / "deployed"))
    records = [json.loads((tmp_path / out / RECORD).read_text()) for out in ("simulated", "deployed")]
    assert records[0] == records[1]
    assert (records[0]["noise"], records[0]["valid"], records[0]["epsilon"]) == ("sum", False, 8.0)
    assert simulated.summary["privacy"]["epsilon"] == 8.0
    rows = rows_of(tmp_path / "deployed")
    assert [row["epsilon"] for row in rows] == [row["epsilon"] for row in rows_of(tmp_path / "simulated")]
    assert 0 < rows[0]["epsilon"] < rows[1]["epsilon"] <= 8.0
    assert "train_loss" not in rows[-1] or rows[-1]["train_loss"] is None


def test_the_noise_is_what_was_promised_whoever_is_lost(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Of the sum that the server opens, with keys that it does not know."""
    sites = SecureSites(tmp_path / "sites", secret(recipe, rounds={"count": 1}), trick=failing("o3", "work"))
    sites.run(tmp_path / "noised")
    quiet = {**recipe["privacy"], "epsilon": None, "noise_multiplier": 1e-5, "randomness": "seeded"}
    still = SecureSites(
        tmp_path / "still", {**recipe, "rounds": {"count": 1}, "privacy": quiet}, trick=failing("o3", "work")
    )
    still.run(tmp_path / "plain")
    record = json.loads((tmp_path / "noised" / RECORD).read_text())
    z = record["noise_multiplier"]
    apart = torch.cat(
        [(last(tmp_path / "noised")[n] - t).reshape(-1).double() for n, t in last(tmp_path / "plain").items()]
    )
    # Three of four answered, of which two suffice, divided by four.
    expected = z * 2**0.5 * (3 / 2) ** 0.5 / 4
    assert float(apart.std()) == pytest.approx(expected, rel=0.16)  # five standard errors
    assert abs(float(apart.mean())) < 5 * expected / len(apart) ** 0.5
    assert rows_of(tmp_path / "noised")[-1]["answered"] == ["o0", "o1", "o2"]
    assert not (tmp_path / "noised" / KEY).exists(), "the sites draw keys, and keep none"


def test_a_simulation_is_resumed_bit_by_bit_and_forgets_its_key(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    whole = fedcustom.run(recipe, out=tmp_path / "whole")
    with pytest.raises(RuntimeError, match="stopped"):
        fedcustom.run(recipe, out=tmp_path / "parts", callbacks=[StopAt(1)])
    parts = fedcustom.run(recipe, out=tmp_path / "parts", resume=True)
    assert equal(last(whole.directory), last(parts.directory))
    one, other = (
        fedcustom.run(secret(recipe, rounds={"count": 1}), out=tmp_path / out) for out in ("one", "other")
    )
    assert not equal(last(one.directory), last(other.directory))
    assert not (one.directory / KEY).exists()


def test_a_round_that_is_asked_for_again_counts_again(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its sum was not opened, as far as a site knows, and after a restart: the others may have
    opened it. After the promised turns a site masks nothing.
    """
    monkeypatch.setattr(parties, "run_id", lambda directory: RUN)
    sites = SecureSites(tmp_path / "sites", secret(recipe), trick=failing("o0", "unmask"))
    sites.run(tmp_path / "out")
    opened = json.loads((sites.folder / "o0" / "fedcustom" / "secure_sums" / f"{RUN}.json").read_text())
    assert list(opened) == ["2.1"], "the others have opened the first sum, of which o0 is one"
    assert rows_of(tmp_path / "out")[0]["answered"] == sites.names
    for name in sites.names:
        sites.start(name)
        assert [one.steps for one in sites.sites[name].ledger.releases(RUN)] == [2]
    with pytest.raises(RunError, match="0 of 4 clients answered"):
        sites.run(tmp_path / "again")
    refused = [str(said["refused"]) for _, _, said in sites.seen if "refused" in said]
    assert len(refused) == 4
    assert all("2 noised changes of this run were sent from here" in reason for reason in refused)


def test_other_turns_of_the_same_run_are_no_more_turns(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server opens a run again with a seed by which the two groups have each other's turns."""
    monkeypatch.setattr(parties, "run_id", lambda directory: RUN)
    rows = [{**row, "owner": f"o{number % 8}"} for number, row in enumerate(make_rows(160, 0))]
    write_jsonl(tmp_path / "rows" / "train.jsonl", rows)
    content = secret(recipe, rounds={"count": 4, "clients_per_round": 4})
    sites = SecureSites(tmp_path / "sites", content)
    sites.run(tmp_path / "out")
    sites.recipe = resolved(load_recipe({**content, "seed": 209}))
    with pytest.raises(RunError, match="0 of 4 clients answered"):
        sites.run(tmp_path / "again")
    (first, *_) = rows_of(tmp_path / "out")
    asked = {name for name, message, said in sites.seen if "refused" in said}
    assert asked.isdisjoint(first["cohort"]), "they have unmasked no sum of round 1 yet"
    for name in sites.names:
        assert sum(one.steps for one in sites.sites[name].ledger.releases(RUN)) == 2


def test_a_site_takes_its_own_turns_alone(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Eight clients, four a round: a server that asks one of the others is refused."""
    rows = [{**row, "owner": f"o{number % 8}"} for number, row in enumerate(make_rows(160, 0))]
    write_jsonl(tmp_path / "rows" / "train.jsonl", rows)
    content = secret(recipe, rounds={"count": 4, "clients_per_round": 4})
    sites = SecureSites(tmp_path / "sites", content)
    sites.run(tmp_path / "out")
    cohorts = [row["cohort"] for row in rows_of(tmp_path / "out")]
    assert set(cohorts[0]) == set(cohorts[2]) != set(cohorts[1]) == set(cohorts[3])
    mine, not_mine = cohorts[0][0], cohorts[1][0]
    releases = sites.sites[mine].ledger.releases()
    assert [(one.unit, one.steps, one.sampling) for one in releases] == [("client", 2, 1.0)]
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert releases[0].noise_multiplier == record["noise_multiplier"]
    work = next(m for name, m, _ in sites.seen if name == not_mine and m["kind"] == "work")
    moved = {**work, "round": 3, "values": {**work["values"], "round": 3}}
    moved["body"] = next(m["body"] for _, m, _ in sites.seen if "body" in m)
    said = sites.sites[not_mine].handle(moved)
    assert "round 3 is not this site's turn" in said.get("refused", "") + said.get("error", ""), said


@pytest.mark.parametrize("other", [{"epsilon": 1000.0}, {"randomness": "seeded"}, {"noise": None}], ids=str)
def test_sites_that_were_told_of_less_noise_do_not_add_up(
    recipe: dict[str, Any], tmp_path: Path, other: dict[str, Any]
) -> None:
    """The server shows two of four sites a recipe with hardly any noise, with noise that it can compute, or
    with none of theirs, to lay the others bare.
    """
    sites = SecureSites(tmp_path / "sites", secret(recipe, rounds={"count": 1}))

    def trick(name: str, message: dict[str, Any]) -> dict[str, Any] | None:
        if message["kind"] == "describe" and name in ("o2", "o3"):
            content = message["values"]["recipe"]
            if other == {"noise": None}:
                content.pop("privacy")
            else:
                content["privacy"] |= other
        return None

    sites.trick = trick
    with pytest.raises(RunError, match="0 of 4 clients answered"):
        sites.run(tmp_path / "out")
    assert not (sites.folder / "o0" / "fedcustom" / "secure_sums").exists(), "nothing was unmasked"


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (
            {"minimum_noise": 50.0},
            "policy.minimum_noise = 50.0: for this run's clients privacy.epsilon = 8.0",
        ),
        ({"max_epsilon": 7.0}, "policy.max_epsilon = 7.0: the recipe says privacy.epsilon = 8.0"),
    ],
)
def test_a_site_refuses_less_noise_than_its_policy_says(
    recipe: dict[str, Any], tmp_path: Path, policy: dict[str, Any], reason: str
) -> None:
    with pytest.raises(DeploymentError, match=reason):
        SecureSites(tmp_path / "sites", secret(recipe), policy=policy).run(tmp_path / "out")


def test_policies_that_noise_of_the_site_satisfies(recipe: dict[str, Any], tmp_path: Path) -> None:
    policy = {"least_unit": "client", "max_epsilon": 9.0, "minimum_noise": 0.2, "secure_sums": True}
    sites = SecureSites(tmp_path / "sites", secret(recipe, rounds={"count": 1}), policy=policy)
    sites.run(tmp_path / "out")
    # A second run of the same clients would spend more than nine in all.
    with pytest.raises(RunError, match=r"turns would spend|0 of 4"):
        sites.run(tmp_path / "again")
    assert any("would spend" in str(said.get("refused")) for _, _, said in sites.seen)
    with pytest.raises(DeploymentError, match=r"privacy\.randomness = 'seeded'"):
        SecureSites(tmp_path / "seeded", recipe, policy=policy).run(tmp_path / "seeded-out")


def test_what_a_site_sends_is_bounded_by_itself(recipe: dict[str, Any], tmp_path: Path) -> None:
    """A learning rate that makes changes of any length: the model moves by no more than bounds and noise."""
    content = {**recipe, "training": {**recipe["training"], "learning_rate": 1e4}, "rounds": {"count": 1}}
    content["privacy"] = {**recipe["privacy"], "epsilon": None, "noise_multiplier": 1e-5}
    sites = SecureSites(tmp_path / "sites", content)
    sites.run(tmp_path / "out")
    first = sites.sites["o0"].participant.method.initialise().tensors  # type: ignore[union-attr]
    head = sites.sites["o0"].participant.method.trainable.head  # type: ignore[union-attr]
    moved = {name: tensor - first[name] for name, tensor in last(tmp_path / "out").items()}
    for names in (head, moved.keys() - head):
        length = float(torch.cat([moved[name].reshape(-1) for name in names]).norm())
        assert length <= 1 + 1e-3
    works = [said for _, message, said in sites.seen if message["kind"] == "work"]
    assert all(set(said["values"]) == {"message"} for said in works)
    assert all(set(safetensors.torch.load_file(said["body"])) == {"masked"} for said in works)
    assert SCALE == 65536


def each(recipe: dict[str, Any], **privacy: Any) -> dict[str, Any]:
    section = {**recipe["privacy"], "noise": "client", "accept_noise": True, **privacy}
    return {**recipe, "secure_sum": None, "privacy": section}


def test_changes_that_each_site_noises_for_itself(recipe: dict[str, Any], tmp_path: Path) -> None:
    fedcustom.run(each(recipe), out=str(tmp_path / "simulated"))
    sites = SecureSites(tmp_path / "sites", each(recipe))
    sites.run(tmp_path / "deployed")
    assert equal(last(tmp_path / "simulated"), last(tmp_path / "deployed"))
    works = [said for _, message, said in sites.seen if message["kind"] == "work"]
    assert len(works) == 8
    assert not any("loss" in said["values"] for said in works)
    site = sites.sites["o0"]
    assert [(one.unit, one.steps, one.integers) for one in site.ledger.releases()] == [("client", 2, False)]


def test_a_site_that_is_asked_again_counts_again(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Noise is fresh each time, so that each answer is a release; after the promised turns there is none."""
    policy = {"least_unit": "client", "max_epsilon": 8.0, "minimum_noise": 0.2}
    sites = SecureSites(tmp_path / "sites", each(recipe, randomness="secret"), policy=policy)
    answers: list[torch.Tensor] = []

    def twice(name: str, message: dict[str, Any]) -> dict[str, Any] | None:
        if name != "o0" or message["kind"] != "work" or message["round"] != 1:
            return None
        for _ in range(2):
            said = sites.sites[name].handle(dict(message))
            tensors = safetensors.torch.load_file(said["body"])
            answers.append(torch.cat([tensors[key].reshape(-1) for key in sorted(tensors)]))
        return said

    sites.trick = twice
    sites.run(tmp_path / "out")
    assert abs(float(torch.corrcoef(torch.stack(answers))[0, 1])) < 0.2
    row = rows_of(tmp_path / "out")[-1]
    assert set(row["answered"]) == {"o1", "o2", "o3"}
    assert "2 noised changes of this run were sent from here" in row["left_out"]["o0"]
