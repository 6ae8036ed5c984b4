"""A site that hides its training rows: what its policy asks for, and its ledger of noised steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedcustom.core.errors import DeploymentError, PolicyError
from fedcustom.deployment.site.ledger import Ledger, Release
from fedcustom.deployment.site.privacy import check_privacy, check_spending, epsilon_of, releases_of
from fedcustom.deployment.site.settings import PolicySettings
from fedcustom.privacy.accounting import Event
from fedcustom.privacy.accounting import Ledger as Spending
from fedcustom.privacy.example_mechanism import Releases, example_mechanism
from fedcustom.privacy.settings import PrivacySettings
from fedcustom.recipe.recipe import load_recipe
from helpers.malicious import Server
from helpers.rows import make_rows

RUN, OTHER = "0" * 16, "1" * 16

SECTION: dict[str, Any] = {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-3}


def mechanism_of(*, head_fits: int = 0, **more: Any) -> Any:
    section = PrivacySettings(**{**SECTION, **more})
    return example_mechanism(section, rows=80, batch_size=8, planned=Releases(6, head_fits))


def test_steps_count_once_more_when_they_are_asked_for_again(tmp_path: Path) -> None:
    """On disk, across restarts; beyond the promise they are refused, in a new run they begin anew."""
    mechanism = mechanism_of(noise_multiplier=None, epsilon=2.0)
    for _ in range(3):
        ledger = Ledger(tmp_path / "ledger.json")
        check_spending(PolicySettings(), ledger, RUN, mechanism, Releases(2))
        ledger.note_release(RUN, *releases_of(mechanism, Releases(2)))
    ledger = Ledger(tmp_path / "ledger.json")
    assert [release.steps for release in ledger.releases(RUN)] == [6]
    with pytest.raises(PolicyError, match="6 noised steps of this run were made here, and 1 more would"):
        check_spending(PolicySettings(), ledger, RUN, mechanism, Releases(1))
    check_spending(PolicySettings(), ledger, OTHER, mechanism, Releases(6))
    with pytest.raises(PolicyError, match=r"policy.max_epsilon = 2.5: 6 more noised steps would spend"):
        check_spending(PolicySettings(max_epsilon=2.5), ledger, OTHER, mechanism, Releases(6))


def test_a_fit_of_the_head_is_spent_whenever_it_is_begun(tmp_path: Path) -> None:
    """It counts like any release of its noise: begun too often it takes the steps' place, then is refused."""
    mechanism = mechanism_of(head_fits=1, noise_multiplier=None, epsilon=2.0, head_share=0.3)
    fit, steps = Releases(head_fits=1), Releases(6)
    ledger = Ledger(tmp_path / "ledger.json")
    for wanted in (fit, steps):
        check_spending(PolicySettings(max_epsilon=2.0), ledger, RUN, mechanism, wanted)
        for release in releases_of(mechanism, wanted):
            ledger.note_release(RUN, release)
    assert epsilon_of(ledger.releases(RUN)) == pytest.approx(2.0, rel=1e-3)
    with pytest.raises(
        PolicyError, match="7 noised steps and sums for the head of this run were made here, and 1"
    ):
        check_spending(PolicySettings(), ledger, RUN, mechanism, fit)
    for _ in range(3):  # of a share of 0.3 of mu squared each
        check_spending(PolicySettings(), ledger, OTHER, mechanism, fit)
        ledger.note_release(OTHER, *releases_of(mechanism, fit))
    with pytest.raises(PolicyError, match=r"privacy\.epsilon: 3 noised steps and sums"):
        check_spending(PolicySettings(), ledger, OTHER, mechanism, fit)
    assert epsilon_of(ledger.releases(OTHER)) < 2.0
    with pytest.raises(PolicyError, match=r"privacy\.epsilon: 3 noised"):
        check_spending(PolicySettings(), ledger, OTHER, mechanism, steps)
    with pytest.raises(
        PolicyError, match=r"max_epsilon = 2\.5: 1 more noised steps and sums for the head would"
    ):
        check_spending(PolicySettings(max_epsilon=2.5), ledger, "2" * 16, mechanism, fit)


def test_releases_of_all_runs_compose(tmp_path: Path) -> None:
    """As one list of releases at the least delta, whatever their runs are called."""
    ledger = Ledger(tmp_path / "ledger.json")
    given = [(RUN, 1.0, 0.1, 1e-3, 4), (OTHER, 0.9, 0.2, 1e-4, 3), (RUN, 1.0, 0.1, 1e-3, 1)]
    for run, noise, sampling, delta, steps in given:
        ledger.note_release(run, Release(noise_multiplier=noise, sampling=sampling, delta=delta, steps=steps))
    expected = Spending((Event(1.0, 5, 0.1), Event(0.9, 3, 0.2))).epsilon(1e-4)
    assert epsilon_of(ledger.releases()) == pytest.approx(expected)
    assert epsilon_of(ledger.releases(OTHER)) < expected
    content = json.loads((tmp_path / "ledger.json").read_text())
    content["runs"][RUN]["releases"][0]["steps"] = 0
    (tmp_path / "ledger.json").write_text(json.dumps(content))
    with pytest.raises(DeploymentError, match="is no ledger"):
        Ledger(tmp_path / "ledger.json")


@pytest.mark.parametrize(
    ("policy", "privacy", "reason"),
    [
        (
            {"least_unit": "example"},
            None,
            "policy.least_unit = 'example'.*privacy.unit = 'none'",
        ),
        ({"least_unit": "client"}, SECTION, "policy.least_unit = 'client'.*privacy.unit = 'example'"),
        (
            {"least_unit": "example"},
            {**SECTION, "unit": "client"},
            "with noise of the server; noise must be",
        ),
        ({"max_epsilon": 1.0}, None, "policy.max_epsilon = 1.0: the recipe says privacy.unit = 'none'"),
        ({"max_epsilon": 1.0}, {**SECTION, "unit": "client"}, "policy.max_epsilon = 1.0.*'client'"),
        (
            {"minimum_noise": 1.5},
            {"unit": "client", "noise": "sum", "noise_multiplier": 1.0, "delta": 1e-3},
            "policy.minimum_noise = 1.5.*privacy.noise_multiplier = 1.0",
        ),
        (
            {"max_epsilon": 1.0},
            {"unit": "client", "noise": "sum", "epsilon": 2.0, "delta": 1e-3},
            "policy.max_epsilon = 1.0.*privacy.epsilon = 2.0",
        ),
        ({"max_epsilon": 1.0}, {"unit": "example", "epsilon": 8.0, "delta": 1e-5}, "privacy.epsilon = 8.0"),
        ({"minimum_noise": 0.5}, None, "policy.minimum_noise = 0.5"),
        ({"minimum_noise": 1.5}, SECTION, "policy.minimum_noise = 1.5.*privacy.noise_multiplier = 1.0"),
        (
            {"minimum_noise": 0.5},
            {"unit": "client", "epsilon": 8.0, "delta": 1e-5},
            "which a site cannot check",
        ),
        ({"least_unit": "example"}, {**SECTION, "randomness": "seeded"}, "privacy.randomness = 'seeded'"),
    ],
)
def test_what_hides_too_little_is_refused(policy: Any, privacy: Any, reason: str) -> None:
    base: dict[str, Any] = {
        "data": {"source": "rows.csv", "text": "{text}", "label": "label"},
        "method": {"name": "lora"},
        **({"privacy": privacy} if privacy else {}),
        **({"secure_sum": {"on": True}} if privacy and privacy.get("noise") == "sum" else {}),
    }
    recipe = load_recipe(base)
    check_privacy(PolicySettings(), recipe)
    with pytest.raises(PolicyError, match=reason):
        check_privacy(PolicySettings(**policy), recipe)


@pytest.mark.parametrize(
    "policy",
    [{"least_unit": "example"}, {"least_unit": "client"}, {"max_epsilon": 9.0}, {"minimum_noise": 0.9}],
)
def test_what_hides_enough_is_not(policy: Any) -> None:
    data = {"source": "rows.csv", "text": "{text}", "label": "label"}
    own = {"unit": "client", "noise": "sum", "noise_multiplier": 1.0, "delta": 1e-3}
    check_privacy(
        PolicySettings(**policy),
        load_recipe({"data": data, "method": {"name": "lora"}, "privacy": own, "secure_sum": {"on": True}}),
    )
    if policy.get("least_unit") == "client":
        return
    check_privacy(
        PolicySettings(**policy), load_recipe({"data": data, "method": {"name": "lora"}, "privacy": SECTION})
    )


def test_units_are_counted_apart(tmp_path: Path) -> None:
    """What hides the site as a whole, and what hides its rows, are promises of two kinds."""
    ledger = Ledger(tmp_path / "ledger.json")
    mechanism = mechanism_of(noise_multiplier=None, epsilon=2.0)
    ledger.note_release(
        OTHER, Release(noise_multiplier=0.3, sampling=1.0, delta=1e-3, steps=9, unit="client")
    )
    check_spending(PolicySettings(max_epsilon=2.5), ledger, RUN, mechanism, Releases(6))
    assert epsilon_of(ledger.releases()) > 50
    # Also of one run, whose recipe the server may change: integers and sampled steps do not compose.
    sums = Release(noise_multiplier=1.0, sampling=1.0, delta=1e-3, steps=1, unit="client", integers=True)
    ledger.note_release(RUN, sums)
    check_spending(PolicySettings(max_epsilon=2.5), ledger, RUN, mechanism, Releases(6))
    again = Ledger(tmp_path / "ledger.json").releases()
    assert [(one.unit, one.steps) for one in again] == [("client", 9), ("client", 1)]


@pytest.fixture
def make(tmp_path: Path, tiny: dict[str, str]) -> Callable[..., Server]:
    def made(**policy: Any) -> Server:
        data = {
            "columns": ["text", "label"],
            "text": "{text}",
            "label": "label",
            "max_labels": 3,
        }
        given = {"base_models": [tiny["bert"]], **policy}
        return Server(tmp_path, make_rows(60, 3), data, given)

    return made


@pytest.fixture
def recipe(tiny: dict[str, str]) -> dict[str, Any]:
    return {
        "model": {"base": tiny["bert"]},
        "data": {"max_length": 24, "text": "{text}", "label": "label"},
        "method": {"name": "lora", "rank": 2},
        "training": {"batch_size": 8, "local_steps": 3, "learning_rate": 0.01},
        "rounds": {"count": 2},
        "privacy": SECTION,
    }


def test_a_server_that_goes_back_spends_twice(make: Callable[..., Server], recipe: dict[str, Any]) -> None:
    """The same round again has other noise, and what it spent is missing in the end."""
    server = make(least_unit="example", max_epsilon=100.0)
    assert "values" in server.begin(recipe), server.site.last_reply
    first, again = (server.train(1, steps=3, **change) for change in ({}, {}))
    for said in (first, again):
        assert "values" in said, said
        assert "loss" not in said["values"]
        assert said["values"]["steps"] == 3
    assert [release.steps for release in server.site.ledger.releases()] == [6]
    assert Ledger(server.own / "ledger.json").releases() == server.site.ledger.releases()
    said = server.train(2, steps=3)
    assert "6 noised steps of this run were made here, and 3 more would spend" in said["refused"]
    assert "values" in server.begin(recipe, run=1)
    assert "values" in server.train(1, steps=3)


@pytest.fixture
def fitting(recipe: dict[str, Any]) -> dict[str, Any]:
    recipe["model"] |= {"pooling": "mean", "normalize": True}
    recipe["training"] |= {"fit_head_rounds": [1], "head_learning_rate": 0.01}
    recipe["privacy"] = {"unit": "example", "epsilon": 2.0, "delta": 1e-3}
    return recipe


def test_a_site_notes_sums_for_the_head_before_it_sends_them(
    make: Callable[..., Server], fitting: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On disk, even where it then fails; all its rows are in the sums, however few a label has."""
    server = make(least_unit="example", max_epsilon=100.0, least_label_examples=1000, sums=True)
    assert "values" in server.begin(fitting), server.site.last_reply
    participant = server.site.participant
    assert participant is not None
    assert participant.withheld.examples == 0
    execute = participant.execute
    monkeypatch.setattr(participant, "execute", lambda *given: 1 / 0)
    assert "error" in server.train(1, steps=3)
    (noted,) = Ledger(server.own / "ledger.json").releases()
    assert participant.mechanism is not None
    expected = (participant.mechanism.head_noise, 1.0, 1e-3, 1)
    assert (noted.noise_multiplier, noted.sampling, noted.delta, noted.steps) == expected
    monkeypatch.setattr(participant, "execute", execute)
    said = server.train(1, steps=3)
    assert "values" in said, said
    assert said["values"].keys() == {"weight", "deviation"}
    assert said["values"]["weight"] == len(participant.data.train)
    assert said["values"]["deviation"] == pytest.approx(2**0.5 * noted.noise_multiplier)
    assert [each.steps for each in server.site.ledger.releases()] == [2]
    assert "values" in server.train(1, steps=3)
    for _ in range(9):
        said = server.train(1, steps=3)
    assert "noised steps and sums for the head of this run were made here" in said["refused"], said


def test_noise_of_sums_for_the_head_is_checked(make: Callable[..., Server], fitting: dict[str, Any]) -> None:
    fitting["privacy"] |= {"epsilon": 8.0, "head_share": 0.9}
    refused = make(minimum_noise=0.6, sums=True).begin(fitting)["refused"]
    assert "policy.minimum_noise = 0.6: sums for the head have noise of 0.5" in refused, refused


def test_noise_for_this_sites_rows_is_checked(make: Callable[..., Server], recipe: dict[str, Any]) -> None:
    server = make(minimum_noise=2.0)
    recipe["privacy"] = {"unit": "example", "epsilon": 8.0, "delta": 1e-3}
    refused = server.begin(recipe)["refused"]
    assert "policy.minimum_noise = 2.0: for this site's rows privacy.epsilon = 8.0" in refused
    recipe["privacy"] = {"unit": "example", "epsilon": 8.0, "delta": 0.09}
    assert "privacy.delta = 0.09: at most 1 / (10 rows)" in server.begin(recipe, run=1)["refused"]
