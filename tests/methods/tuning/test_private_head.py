"""A head of noised counts and sums: what a client sends, how far it can move them, and what comes of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedcustom.core.errors import UpdateError
from fedcustom.core.tensors import norm, subtract
from fedcustom.methods import Answer, State, WeightTuning, Work
from fedcustom.methods.tuning.head_messages import private_sums
from fedcustom.methods.tuning.head_solution import private_head
from fedcustom.methods.tuning.release import ClientRelease, clipped_sums
from fedcustom.privacy.client_mechanism import client_mechanism
from fedcustom.privacy.noise import NoiseKey
from fedcustom.privacy.settings import PrivacySettings
from helpers.methods import make, skewed


def release_of(noise: float = 1e-6, **more: Any) -> ClientRelease:
    settings = PrivacySettings.model_validate(
        {"unit": "client", "noise_multiplier": noise, "delta": 1e-3} | more
    )
    mechanism = client_mechanism(settings, clients=3, clients_per_round=3, factors=[1.0], head_fits=1)
    return ClientRelease(mechanism, NoiseKey.seeded(0), {1})


def method_of(path: str, release: ClientRelease | None) -> WeightTuning:
    training = {"optimizer": "sgd", "fit_head_rounds": [1], "fit_head_steps": 0, "freeze_head_rounds": 2}
    found = make(path, "prefix", training=training, clients=3)
    privacy = release_of().mechanism.settings
    context = replace(found.context, privacy=privacy, release=release)
    found.server.parts.context = found.client.parts.context = context
    found.head_fit.privacy, found.head_fit.release = privacy, release
    found.client.head.privacy = privacy
    return found


def answers_of(method: WeightTuning, state: State) -> list[Answer]:
    clients = skewed()
    tasks = method.configure(state, 1, {name: Work(epochs=1) for name in clients})
    answers = []
    for name, client in clients.items():
        update = method.execute(tasks[name], client)
        method.check(tasks[name], update)
        answers.append(Answer(name, tasks[name], update))
    return answers


def test_sums_are_of_unit_vectors_and_cut_to_the_bound() -> None:
    vectors, labels = torch.randn(9, 5) * 7, torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 0])
    sums = private_sums(vectors, labels, 4)
    rows = vectors / vectors.norm(dim=1, keepdim=True)
    assert sums["counts"].tolist() == [3, 4, 2, 0]
    torch.testing.assert_close(sums["totals"][1], rows[2:6].sum(dim=0))
    settings = release_of(head_clip=2.0).mechanism.settings
    assert norm(clipped_sums(sums, settings)) == pytest.approx(2.0, rel=1e-5)
    one = private_sums(vectors[:1], labels[:1], 4)
    assert norm(one) == pytest.approx(2**0.5)
    assert norm(clipped_sums(one, settings)) == pytest.approx(2**0.5)


def test_without_noise_the_head_is_the_discriminant_of_the_means() -> None:
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(3, 16))
    labels = np.repeat([0, 1, 2], [40, 30, 20])
    rows = centres[labels] + 0.5 * generator.normal(size=(90, 16))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    sums = private_sums(torch.from_numpy(rows).float(), torch.from_numpy(labels), 3)

    class Layer:
        weight, bias = "w", "b"

    head = private_head(Layer, sums["counts"], sums["totals"], 0.0)  # type: ignore[arg-type]
    logits = rows @ head["w"].numpy().T + head["b"].numpy()
    means = np.stack([rows[labels == c].mean(axis=0) for c in range(3)])
    shares = (np.array([40, 30, 20]) + 0.5) / 91.5
    expected = -((rows[:, None] - means) ** 2).sum(-1) * 16 / 10 / 2 + np.log(shares)
    difference = logits - expected
    assert np.ptp(difference, axis=1) == pytest.approx(0, abs=1e-4)
    assert (logits.argmax(axis=1) == labels).mean() > 0.95


def test_a_client_moves_the_sums_by_its_bound(sentence: str) -> None:
    release = release_of(head_clip=3.0)
    method = method_of(sentence, release)
    state = method.initialise()
    updates = [answer.update.tensors for answer in answers_of(method, state)]
    forms = {name: torch.empty_like(tensor) for name, tensor in updates[0].items()}
    whole, deviation = release.head_sums(updates, forms, 1)
    assert deviation == pytest.approx(3.0 * (release.mechanism.head_noise or 0))
    huge = [{name: 1e6 * tensor for name, tensor in updates[0].items()}, *updates[1:]]
    assert norm(subtract(release.head_sums(huge, forms, 1)[0], whole)) <= 6.0 * (1 + 1e-9)
    assert norm(subtract(release.head_sums(updates[1:], forms, 1)[0], whole)) <= 3.0 * (1 + 1e-9)
    assert norm(subtract(release.head_sums(updates, forms, 2)[0], whole)) > 0  # another round, other noise


def test_a_round_ends_with_the_head_and_tells_of_no_client(sentence: str) -> None:
    method = method_of(sentence, release_of())
    state = method.initialise()
    following = method.aggregate(state, answers_of(method, state))
    assert set(following.state.server) == set(state.server)  # no client's labels
    counts = following.state.values["label_counts"]
    true = [sum(e.label == label for c in skewed().values() for e in c.data.train) for label in range(3)]
    assert all(type(count) is int and count >= 0 for count in counts)
    assert sum(counts) <= sum(true)  # clipped
    assert "noised sums of 3 clients" in following.report["head"]
    changed = {n for n, t in following.state.tensors.items() if not torch.equal(t, state.tensors[n])}
    assert changed == set(method.head_fit.names)


def test_noise_in_the_sums_has_the_deviation_of_the_mechanism() -> None:
    release = release_of(noise=2.0)
    forms = {"counts": torch.empty(50), "totals": torch.empty(50, 400)}
    found, deviation = release.head_sums([], forms, 1)
    assert float(found["totals"].std()) == pytest.approx(deviation, rel=0.03)


def test_other_forms_are_refused_and_who_has_no_key_releases_nothing(sentence: str) -> None:
    method = method_of(sentence, None)
    state = method.initialise()
    answers = answers_of(method, state)
    with pytest.raises(RuntimeError, match="no key"):
        method.aggregate(state, answers)
    task, update = answers[0].task, answers[0].update
    for tensors in (
        {"counts": update.tensors["counts"]},
        {**update.tensors, "factor": torch.zeros(3)},
        {**update.tensors, "counts": torch.full_like(update.tensors["counts"], float("nan"))},
        {**update.tensors, "totals": update.tensors["totals"][:1]},
    ):
        with pytest.raises(UpdateError):
            method.check(task, replace(update, tensors=tensors))
