"""Whether probabilities are honest: calibration error, and the temperature that a run's logits are given."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

import fedcustom
from fedcustom.core.errors import UpdateError
from fedcustom.data.build import build_data
from fedcustom.deployment.evaluation import RemoteEvaluation
from fedcustom.deployment.replies import PartSizes, SiteStatistics
from fedcustom.evaluation.calibration import (
    BINS,
    SCALES,
    best_scale,
    expected_calibration_error,
    reliability,
    tempered_losses,
)
from fedcustom.evaluation.metrics import classification_metrics, client_mean, is_better, worst_client
from fedcustom.evaluation.statistics import (
    check_statistics,
    classification_statistics,
    pooled_metrics,
    pooled_scale,
)
from fedcustom.federated.build import make_method
from fedcustom.federated.run_directory import Checkpoints
from fedcustom.models.load import load_base
from fedcustom.recipe.recipe import load_recipe

Array = np.ndarray[Any, Any]


def drawn(seed: int, rows: int, classes: int, scale: float = 1.0) -> tuple[Array, Array]:
    """Logits, and labels drawn from what they say once they are divided by ``scale``."""
    generator = np.random.default_rng(seed)
    logits = 2 * generator.normal(size=(rows, classes))
    shares = softmax(logits, axis=1)
    return scale * logits, np.array([generator.choice(classes, p=row) for row in shares])


def error_by_hand(logits: Array, labels: Array) -> float:
    """The sum over bins of their share of examples times |accuracy - confidence|."""
    shares = softmax(logits, axis=1)
    confidence, right = shares.max(axis=1), shares.argmax(axis=1) == labels
    total = 0.0
    for number in range(BINS):
        lower, upper = number / BINS, (number + 1) / BINS
        inside = (confidence > lower) & (confidence <= upper)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


@given(st.integers(0, 999), st.integers(1, 60), st.integers(2, 6), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_bins_add_up_to_the_calibration_error(seed: int, rows: int, classes: int, clients: int) -> None:
    logits, labels = drawn(seed, rows, classes, 2.0)
    owners = np.random.default_rng(seed).integers(clients, size=rows)
    parts = [
        reliability(logits[owners == k], labels[owners == k]) for k in range(clients) if (owners == k).any()
    ]
    together = np.sum(parts, axis=0)
    np.testing.assert_allclose(together, reliability(logits, labels), atol=1e-9)
    assert together[:, 0].sum() == rows
    expected = error_by_hand(logits, labels)
    assert expected_calibration_error(together.tolist()) == pytest.approx(expected, abs=1e-9)
    metrics = classification_metrics(torch.from_numpy(logits), torch.from_numpy(labels))
    assert metrics["calibration_error"] == pytest.approx(expected, abs=1e-9)
    statistics = [
        classification_statistics(logits[owners == k], labels[owners == k].tolist())
        for k in range(clients)
        if (owners == k).any()
    ]
    sent = [check_statistics(json.loads(json.dumps(part)), classes) for part in statistics]
    pooled = pooled_metrics(sent)
    assert pooled["calibration_error"] == pytest.approx(expected, abs=1e-9)
    assert pooled["loss"] == pytest.approx(metrics["loss"])
    assert pooled_scale(sent) == pytest.approx(best_scale(tempered_losses(logits, labels.tolist())))


def test_calibration_by_hand() -> None:
    """Four answers with confidence 0.85, of which one is right: 0.6 beside the truth."""
    logits = torch.log(torch.tensor([[0.85, 0.15]] * 4, dtype=torch.double))
    metrics = classification_metrics(logits, torch.tensor([0, 1, 1, 1]))
    assert metrics["calibration_error"] == pytest.approx(0.85 - 0.25)
    bins = reliability(logits.numpy(), [0, 1, 1, 1])
    assert bins[12] == [4.0, pytest.approx(3.4), 1.0]  # 0.8 to 0.867
    assert sum(map(sum, bins)) == pytest.approx(8.4)
    sure = np.array([[1000.0, 0.0]])
    assert reliability(sure, [0])[-1] == [1.0, 1.0, 1.0]
    assert is_better(0.1, 0.2, "calibration_error")
    clients = {"a": {"calibration_error": 0.1}, "b": {"calibration_error": 0.3}}
    assert worst_client(clients) == {"calibration_error": 0.3}
    assert client_mean(clients) == {"calibration_error": pytest.approx(0.2)}


def best_by_scipy(logits: Array, labels: Array) -> float:
    """1 / temperature that gives the least loss, with a normal prior on its log."""

    def loss(power: float) -> float:
        likely = log_softmax(math.exp(power) * logits, axis=1)[np.arange(len(labels)), labels]
        return 0.5 * power**2 - float(likely.sum())

    return math.exp(minimize_scalar(loss, bounds=(-4, 4), method="bounded", options={"xatol": 1e-8}).x)


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.5, 7.0])
def test_the_temperature_is_that_of_least_loss(scale: float) -> None:
    logits, labels = drawn(0, 4000, 5, scale)
    expected = best_by_scipy(logits, labels)
    found = best_scale(tempered_losses(logits, labels.tolist()))
    assert found == pytest.approx(expected, rel=2e-3)
    assert found == pytest.approx(1 / scale, rel=0.1)
    losses = tempered_losses(logits, labels.tolist())
    for factor, loss in list(zip(SCALES, losses, strict=True))[::8]:
        by_hand = -log_softmax(factor * logits, axis=1)[np.arange(4000), labels].sum()
        assert loss == pytest.approx(by_hand)


@pytest.mark.parametrize("number", [1, 3, 20, 50])
def test_few_examples_say_little_of_the_temperature(number: int) -> None:
    """Where all is right, or all wrong, the best by likelihood alone would be without end."""
    logits, labels = drawn(1, number, 3)
    for wanted in (logits.argmax(axis=1), logits.argmin(axis=1)):
        found = best_scale(tempered_losses(logits, wanted.tolist()))
        assert found == pytest.approx(max(0.1, best_by_scipy(logits, wanted)), rel=1e-2)
        assert found < 10
    assert best_scale(tempered_losses(np.zeros((number, 3)), labels.tolist())) == pytest.approx(1)


# --- in a run ---


def development(run: fedcustom.Run) -> tuple[Any, Array, Array]:
    """The run's data, and its best round's logits on the development split with their labels."""
    recipe = run.recipe
    data = build_data(recipe.data, recipe.clients, recipe.seed)
    method = make_method(recipe, load_base(recipe.model, data.task, recipe.seed))
    state = Checkpoints(run.directory / "checkpoints").load(run.summary["best_round"]).state
    scores = method.predict(state, data.development, texts=False).scores
    return data, scores, np.array([example.label for example in data.development])


@pytest.mark.parametrize(
    ("model", "method"),
    [
        ("sentence", "prefix"),
        ("sentence", "full"),
        ("bert", "lora"),
        ("llama", "lora"),
        ("sentence", "probe"),
    ],
)
def test_a_run_is_calibrated(
    small: dict[str, Any], tiny: dict[str, str], sentence: str, tmp_path: Path, model: str, method: str
) -> None:
    recipe = {**small, "method": {"name": method}, "model": {"base": {**tiny, "sentence": sentence}[model]}}
    overrides = {"training.learning_rate": 0.03, "training.local_epochs": 3}
    run = fedcustom.run(recipe, overrides, out=tmp_path / "run")
    plain = fedcustom.run(recipe, {**overrides, "evaluation.calibrate": False}, out=tmp_path / "plain")
    temperature = run.summary["temperature"]
    data, scores, labels = development(run)
    best = best_by_scipy(scores, labels)
    assert temperature == pytest.approx(1 / min(max(best, 0.1), 10), rel=0.02)
    assert temperature != pytest.approx(1, abs=1e-3)
    assert plain.summary["temperature"] is None
    ours, theirs = run.summary["metrics"], plain.summary["metrics"]
    assert (ours["accuracy"], ours["macro_f1"]) == (theirs["accuracy"], theirs["macro_f1"])

    def loss(logits: Array) -> float:
        return -float(log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean())

    assert loss(scores / temperature) <= loss(scores)
    # What is exported says so, and so does all that is told of it.
    exported, saved = run._method
    found = exported.predict(saved, data.development, texts=False).scores
    np.testing.assert_allclose(found, scores / temperature, rtol=1e-4, atol=1e-4 * abs(found).max())
    on_test = exported.predict(saved, data.test, texts=False).scores
    truth = np.array([example.label for example in data.test])
    assert ours["calibration_error"] == pytest.approx(error_by_hand(on_test, truth), abs=1e-4)
    answer = run.predict([data.test[0].text])[0]
    assert answer["probability"] == pytest.approx(softmax(on_test[0]).max(), abs=1e-4)
    lines = [json.loads(line) for line in (run.directory / "predictions.jsonl").read_text().splitlines()]
    assert lines[0]["probability"] == pytest.approx(softmax(on_test[0]).max(), abs=1e-4)
    row = next(r for r in run.history.to_dict("records") if r["round"] == run.summary["best_round"])
    assert row["development.calibration_error"] == pytest.approx(error_by_hand(scores, labels), abs=1e-6)


@pytest.mark.parametrize(
    "overrides",
    [{"baseline": "local"}, {"personalisation.keep": ["head"]}, {"method": {"name": "prompt_engineering"}}],
)
def test_there_is_no_temperature_where_there_is_no_one_head(
    small: dict[str, Any], tmp_path: Path, overrides: dict[str, Any]
) -> None:
    recipe = {**small, **{key: overrides[key] for key in overrides if "." not in key}}
    if "method" in overrides:
        recipe.pop("training")
    rest = {key: value for key, value in overrides.items() if "." in key}
    assert fedcustom.run(recipe, rest, out=tmp_path / "run").summary["temperature"] is None


def test_generation_has_no_temperature(generation: dict[str, Any], tmp_path: Path) -> None:
    assert fedcustom.run(generation, {"rounds.count": 1}, out=tmp_path / "run").summary["temperature"] is None


# --- across sites ---


def test_sites_find_the_temperature_together() -> None:
    """From sums alone; those that tell only of their own versions have no part in it."""
    logits, labels = drawn(2, 300, 4, 3.0)
    parts = {
        f"s{k}": SiteStatistics(classification_statistics(logits[k::3], labels[k::3].tolist()))
        for k in range(3)
    }
    connection: Any = SimpleNamespace(evaluate=lambda *_: iter(parts.items()))
    participants: Any = SimpleNamespace(
        labels=["a", "b", "c", "d"], sizes=dict.fromkeys(parts, PartSizes(100, 100, 100))
    )
    memories: Any = SimpleNamespace(after=1)
    data: Any = SimpleNamespace(development=[])
    nothing: Any = None
    method: Any = SimpleNamespace(keeps_parts=lambda: False)
    evaluation = RemoteEvaluation(load_recipe({}), method, nothing, data, connection, participants, memories)
    assert evaluation.scale(nothing) == pytest.approx(best_by_scipy(logits, labels), rel=5e-3)
    for name, site in parts.items():
        parts[name] = SiteStatistics(personalised=site.global_model)
    method.keeps_parts = lambda: True
    assert evaluation.scale(nothing) == 1.0


SOUND = classification_statistics(np.array([[2.0, 0.0], [0.0, 1.0], [0.5, 0.0]]), [0, 1, 1])


def with_bin(place: int, row: list[Any]) -> list[Any]:
    return [row if number == place else each for number, each in enumerate(SOUND["bins"])]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bins": None}, "the bins of confidence are not sound"),
        ({"bins": SOUND["bins"][1:]}, "the bins of confidence are not sound"),
        ({"bins": with_bin(0, [0.0, 0.0])}, "the bins of confidence are not sound"),
        ({"bins": with_bin(0, [0.0, 0.0, math.nan])}, "the bins of confidence are not sound"),
        ({"bins": with_bin(0, ["0", 0.0, 0.0])}, "the bins of confidence are not sound"),
        ({"bins": with_bin(0, [1.0, 0.0, 0.0])}, "not those of the examples"),
        ({"bins": with_bin(0, [0.0, 0.0, 1.0])}, "not those of the examples"),
        ({"bins": with_bin(0, [0.0, 0.5, 0.0])}, "not those of the examples"),
        ({"bins": with_bin(0, [0.0, -0.5, 0.0])}, "not those of the examples"),
        ({"tempered": None}, "the losses at several temperatures"),
        ({"tempered": SOUND["tempered"][1:]}, "the losses at several temperatures"),
        ({"tempered": [-1.0, *SOUND["tempered"][1:]]}, "the losses at several temperatures"),
        ({"tempered": [math.inf, *SOUND["tempered"][1:]]}, "the losses at several temperatures"),
    ],
)
def test_unsound_statistics_are_refused(wrong: dict[str, Any], message: str) -> None:
    assert check_statistics(SOUND, 2) == SOUND
    with pytest.raises(UpdateError, match=message):
        check_statistics({**SOUND, **wrong}, 2)
    with pytest.raises(UpdateError):
        check_statistics({key: value for key, value in SOUND.items() if key not in wrong}, 2)
