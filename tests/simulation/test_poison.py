"""Noisy labels, poisoned data, conspiring clients and perturbed test texts."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import fedcustom
from fedcustom.core.errors import RecipeError
from fedcustom.data.build import build_data
from fedcustom.data.examples import ClientData, Example
from fedcustom.data.perturb import PERTURBATIONS, characters, perturbed, typos, words
from fedcustom.methods import Update
from fedcustom.recipe.recipe import load_recipe
from fedcustom.simulation.poison import backdoor_probes, noisy_clients, poisoned, with_noise
from fedcustom.simulation.settings import AttackSettings, NoiseSettings
from fedcustom.updates.attack import LittleIsEnough, hostile_clients, unsuspicious_deviations
from helpers.runs import rows_of

LABELS = ("a", "b", "c", "d")


def clients_of(count: int = 20, size: int = 40) -> dict[str, ClientData]:
    def part(n: int) -> list[Example]:
        return [Example(f"text {n} {i}", label=(n + i) % 4) for i in range(size)]

    return {f"c{n}": ClientData(f"c{n}", part(n), part(n)[:5], part(n)[5:9]) for n in range(count)}


def test_labels_that_are_wrong_by_mistake() -> None:
    """The right share at the right share of clients; symmetric; texts and scored parts untouched."""
    before = clients_of()
    after = with_noise(before, NoiseSettings(labels=0.4, clients=0.3), 4, seed=1)
    changed = {
        name: [(old.label, new.label) for old, new in zip(before[name].train, client.train, strict=True)
               if old.label != new.label]
        for name, client in after.items()
    }  # fmt: skip
    assert {name for name, pairs in changed.items() if pairs} == noisy_clients(
        list(before), NoiseSettings(labels=0.4, clients=0.3), 1
    )
    assert sorted(len(pairs) for pairs in changed.values()) == [0] * 14 + [16] * 6
    counts = np.zeros((4, 4))
    many = with_noise(clients_of(1, 12_000), NoiseSettings(labels=1.0, clients=1.0), 4, seed=1)["c0"].train
    for place, example in enumerate(many):
        counts[place % 4, example.label] += 1
    assert np.diag(counts).sum() == 0
    assert stats.chisquare(counts[~np.eye(4, dtype=bool)]).pvalue > 1e-3
    for name, client in after.items():
        assert [e.text for e in client.train] == [e.text for e in before[name].train]
        assert (client.development, client.test) == (before[name].development, before[name].test)
    assert with_noise(before, NoiseSettings(labels=0.4, clients=0.3), 4, seed=1) == after
    assert with_noise(before, NoiseSettings(labels=0.4, clients=0.3), 4, seed=2) != after


def test_flipped_labels_and_backdoors() -> None:
    before = clients_of()
    flip = poisoned(before, AttackSettings(kind="label_flip"), {"c3"}, LABELS, 0)
    assert [e.label for e in flip["c3"].train] == [3 - e.label for e in before["c3"].train]
    assert all(flip[name] is before[name] for name in before if name != "c3")
    settings_ = AttackSettings(kind="backdoor", target="c", trigger="zq", poisoned_share=0.25)
    back = poisoned(before, settings_, {"c3"}, LABELS, 0)
    pairs = list(zip(before["c3"].train, back["c3"].train, strict=True))
    bad = [(old, new) for old, new in pairs if old != new]
    assert len(bad) == 10
    assert all((new.text, new.label) == (f"zq {old.text}", 2) for old, new in bad)
    test = [Example(f"t{i}", label=i % 4) for i in range(8)]
    probes = backdoor_probes(test, settings_, LABELS)
    assert [e.text for e in probes["success_rate"]] == [f"zq t{i}" for i in (0, 1, 3, 4, 5, 7)]
    assert {e.label for kind in probes.values() for e in kind} == {2}
    assert backdoor_probes(test, AttackSettings(), LABELS) == {}
    with pytest.raises(RecipeError, match=r"attack\.target = 'e': no such label; allowed: a, b, c, d"):
        backdoor_probes(test, AttackSettings(kind="backdoor", target="e"), LABELS)


def test_a_little_is_enough() -> None:
    """Baruch et al. 2019: all send mean - z deviation of the hostile clients' own changes."""
    generator = np.random.default_rng(0)
    changes = generator.normal(size=(3, 7)).astype(np.float32)
    updates = {f"c{i}": Update({"w": torch.from_numpy(row)}, 1.0 + i) for i, row in enumerate(changes)}
    hostile = frozenset(updates)
    sent = LittleIsEnough(hostile, AttackSettings(kind="alie", deviations=1.5)).on_clients(updates, 10)
    expected = changes.mean(axis=0) - 1.5 * changes.std(axis=0)
    for name, update in sent.items():
        np.testing.assert_allclose(update.tensors["w"].numpy(), expected, rtol=1e-5, atol=1e-6)
        assert update.weight == updates[name].weight
    # the paper's example: 50 clients, 24 hostile, 2 supporters
    assert unsuspicious_deviations(50, 24) == pytest.approx(stats.norm.ppf((50 - 24 - 2) / (50 - 24)))
    assert unsuspicious_deviations(10, 6) == 0.0
    attack = LittleIsEnough(hostile, AttackSettings(kind="alie"))
    alone = attack.on_clients({"c0": updates["c0"]}, 10)
    assert torch.equal(alone["c0"].tensors["w"], updates["c0"].tensors["w"])
    other = {**updates, "c9": Update({"w": torch.zeros(3)})}
    with pytest.raises(RecipeError, match="send the same shapes"):
        attack.on_clients(other, 10)


def test_conspirators_in_a_whole_run(small: dict[str, Any], tmp_path: Path) -> None:
    """One by one and in cohorts the same; with no deviation, what an honest run gives."""
    attack = {
        "attack.kind": "alie",
        "attack.fraction": 0.5,
        "attack.deviations": 3.0,
        "training.optimizer": "sgd",
    }
    losses = {}
    for name, more in {
        "cohort": attack,
        "alone": {**attack, "training.cohort_width": 1},
        "honest": {"training.optimizer": "sgd"},
    }.items():
        run = fedcustom.run(small, more, out=tmp_path / name)
        losses[name] = rows_of(run.directory)[-1]["development"]["loss"]
        assert len(rows_of(run.directory)[-1]["answered"]) == 4
    assert losses["cohort"] == pytest.approx(losses["alone"], rel=1e-4)
    assert losses["cohort"] != pytest.approx(losses["honest"], rel=1e-4)


def test_a_backdoor_and_perturbed_texts_in_a_whole_run(small: dict[str, Any], tmp_path: Path) -> None:
    """The figures are the accuracy, by hand, of the finished model on texts that are made by hand."""
    run = fedcustom.run(
        small,
        {"attack.kind": "backdoor", "attack.fraction": 0.5, "attack.target": "food",
         "attack.trigger": "hill hill", "attack.poisoned_share": 1.0,
         "training.learning_rate": 0.1, "rounds.count": 4,
         "evaluation.perturb": ["typos", "words"], "evaluation.perturb_rate": 0.5, "noise.labels": 0.1},
        out=tmp_path / "run",
    )  # fmt: skip
    data = build_data(run.recipe.data, run.recipe.clients, run.recipe.seed)
    labels = data.task.labels
    others = [example for example in data.test if labels[example.label] != "food"]
    said = [answer["label"] for answer in run.predict([f"hill hill {example.text}" for example in others])]
    plain = [answer["label"] for answer in run.predict([example.text for example in others])]
    found = run.summary["backdoor"]
    assert found["success_rate"] == pytest.approx(np.mean([label == "food" for label in said]))
    assert found["without_trigger"] == pytest.approx(np.mean([label == "food" for label in plain]))
    texts = perturbed(data.test, "words", 0.5, [0, 15])
    answers = run.predict([example.text for example in texts])
    right = [a["label"] == labels[e.label] for a, e in zip(answers, texts, strict=True)]
    assert run.summary["perturbed"]["words"]["accuracy"] == pytest.approx(np.mean(right))
    assert run.summary["perturbed"].keys() == {"typos", "words"}


def test_noise_reaches_baselines_too(small: dict[str, Any], tmp_path: Path) -> None:
    more = {"baseline": "centralised", "training.learning_rate": 0.05, "rounds.count": 10}
    clean = fedcustom.run(small, more, out=tmp_path / "clean")
    noisy = fedcustom.run(small, {**more, "noise.labels": 1.0, "noise.clients": 1.0}, out=tmp_path / "noisy")
    assert noisy.summary["metrics"]["loss"] > clean.summary["metrics"]["loss"]


@given(st.text("abc dé1 ", max_size=60), st.floats(0.05, 1), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_perturbations(text: str, rate: float, seed: int) -> None:
    for change in PERTURBATIONS.values():
        once, again = (change(text, rate, np.random.default_rng(seed)) for _ in range(2))
        assert once == again
        assert bool(once.strip()) == bool(text.strip())
    replaced = characters(text, rate, np.random.default_rng(seed))
    assert len(replaced) == len(text)
    assert [c.isspace() for c in replaced] == [c.isspace() for c in text]
    kept = iter(text.split(" "))
    assert all(word in kept for word in words(text, rate, np.random.default_rng(seed)).split(" "))
    pairs = zip(text.split(" "), typos(text, rate, np.random.default_rng(seed)).split(" "), strict=True)
    assert all(abs(len(old) - len(new)) <= 1 for old, new in pairs)


def test_how_much_is_perturbed() -> None:
    text = " ".join(["abcdefgh"] * 4000)
    examples = [Example(text, label=2)]
    for kind in ("typos", "words"):
        (changed,) = perturbed(examples, kind, 0.2, [0])
        assert changed.label == 2
        untouched = len(re.findall(r"\babcdefgh\b", changed.text))
        assert untouched == pytest.approx(3200, abs=5 * math.sqrt(4000 * 0.2 * 0.8) + 120)
    (changed,) = perturbed(examples, "characters", 0.2, [0])
    differing = sum(a != b for a, b in zip(changed.text, text, strict=True))
    assert differing == pytest.approx(32_000 * 0.2 * 25 / 26, rel=0.05)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"data.task": "generation", "attack.kind": "label_flip"},
            "attack.kind = 'label_flip': needs labels",
        ),
        ({"data.task": "generation", "noise.labels": 0.1}, "noise.labels = 0.1: needs labels"),
        ({"noise.labels": 1.5}, "noise.labels = 1.5: .*less than or equal to 1"),
        ({"evaluation.perturb": ["typo"]}, "evaluation.perturb.0 = 'typo': must be 'typos'"),
        ({"baseline": "local", "attack.kind": "alie"}, "needs baseline = 'federated'"),
    ],
)
def test_bad_input(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe({}, overrides)


def test_at_least_one_is_hostile() -> None:
    assert len(hostile_clients(["a", "b"], AttackSettings(kind="label_flip", fraction=0.1), 0)) == 1
