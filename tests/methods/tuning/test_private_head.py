"""A head of noised counts and sums: what a client sends, how far it can move them, and what comes of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcustom.core.errors import UpdateError
from fedcustom.core.tensors import norm, subtract
from fedcustom.methods import Answer, State, WeightTuning, Work
from fedcustom.methods.tuning.head_messages import private_sums
from fedcustom.methods.tuning.head_solution import SPREAD, _expected_counts, private_head
from fedcustom.methods.tuning.release import ClientRelease, clipped_sums
from fedcustom.privacy.client_mechanism import client_mechanism
from fedcustom.privacy.noise import NoiseKey
from fedcustom.privacy.settings import PrivacySettings
from helpers.methods import make, skewed


def release_of(noise: float = 1e-6, **more: Any) -> ClientRelease:
    section = PrivacySettings.model_validate(
        {"unit": "client", "noise_multiplier": noise, "delta": 1e-3} | more
    )
    mechanism = client_mechanism(section, clients=3, clients_per_round=3, factors=[1.0], head_fits=1)
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
    section = release_of(head_clip=2.0).mechanism.settings
    assert norm(clipped_sums(sums, section)) == pytest.approx(2.0, rel=1e-5)
    one = private_sums(vectors[:1], labels[:1], 4)
    assert norm(one) == pytest.approx(2**0.5)
    assert norm(clipped_sums(one, section)) == pytest.approx(2**0.5)


def test_without_noise_the_head_is_the_discriminant_of_the_means() -> None:
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(3, 16))
    labels = np.repeat([0, 1, 2], [40, 30, 20])
    rows = centres[labels] + 0.5 * generator.normal(size=(90, 16))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    sums = private_sums(torch.from_numpy(rows).float(), torch.from_numpy(labels), 3)
    head = private_head(Layer, sums["counts"], sums["totals"], 0.0)  # type: ignore[arg-type]
    logits = rows @ head["w"].numpy().T + head["b"].numpy()
    means = np.stack([rows[labels == c].mean(axis=0) for c in range(3)])
    shares = (np.array([40, 30, 20]) + 0.5) / 91.5
    expected = -((rows[:, None] - means) ** 2).sum(-1) * 16 / 10 / 2 + np.log(shares)
    difference = logits - expected
    assert np.ptp(difference, axis=1) == pytest.approx(0, abs=1e-4)
    assert (logits.argmax(axis=1) == labels).mean() > 0.95


class Layer:
    weight, bias = "w", "b"


def solved(counts: torch.Tensor, totals: torch.Tensor, deviation: float) -> tuple[np.ndarray, np.ndarray]:
    head = private_head(Layer, counts, totals, deviation)  # type: ignore[arg-type]
    return head["w"].double().numpy(), head["b"].double().numpy()


def mixture(seed: int, labels: int, skew: float, apart: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors of length 1 around one mean for each label, all of which are around a common one."""
    generator = np.random.default_rng(seed)
    shares = np.arange(1.0, labels + 1) ** -skew
    drawn = generator.choice(labels, size=3000, p=shares / shares.sum())
    centre = generator.normal(size=64) / 8
    means = centre / 2 + apart * generator.normal(size=(labels, 64)) / 8
    rows = means[drawn] + generator.normal(size=(3000, 64)) / 10
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return torch.from_numpy(rows), torch.from_numpy(drawn)


def noised(sums: Any, deviation: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(  # type: ignore[return-value]
        sums[name].double() + deviation * torch.randn(sums[name].shape, generator=generator).double()
        for name in ("counts", "totals")
    )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    labels=st.integers(2, 12),
    skew=st.sampled_from([0.0, 1.0, 3.0]),
    deviation=st.sampled_from([1e-6, 0.5, 3.0, 30.0, 300.0, 1e5]),
)
def test_no_noise_makes_a_head_large(seed: int, labels: int, skew: float, deviation: float) -> None:
    """All is finite; weights and biases are at most those that vectors of length 1 can have: a row of the
    weights is at most SPREAD times a difference of two means, by which much noise may stand out.
    """
    rows, drawn = mixture(seed, labels, skew, 0.6)
    weight, bias = solved(*noised(private_sums(rows, drawn, labels), deviation, seed), deviation)
    strength = 64 / SPREAD
    assert np.isfinite(weight).all()
    assert np.isfinite(bias).all()
    assert np.linalg.norm(weight, axis=1).max() <= 2 * strength
    assert np.ptp(bias) <= math.log(1 + 3000 / 0.5 + 10 * deviation) + 6 * strength


@pytest.mark.parametrize("skew", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("apart", [0.3, 0.8])
def test_more_noise_is_never_worse_than_the_majority(skew: float, apart: float) -> None:
    """Accuracy falls from that of the plain discriminant to the majority's share, and not below, as long as
    noise leaves the most frequent label to be seen.
    """
    rows, drawn = mixture(0, 6, skew, apart)
    sums = private_sums(rows, drawn, 6)
    accuracy = {}
    for deviation in (0.0, 1e-3, 3.0, 30.0):
        heads = [solved(*noised(sums, deviation, seed), deviation) for seed in range(8)]
        right = [((rows.numpy() @ w.T + b).argmax(axis=1) == drawn.numpy()).mean() for w, b in heads]
        accuracy[deviation] = float(np.mean(right))
    majority = float(sums["counts"].max()) / 3000
    assert accuracy[1e-3] == pytest.approx(accuracy[0.0], abs=2e-3)
    assert accuracy[3.0] > majority + 0.8 * (accuracy[0.0] - majority)
    assert accuracy[30.0] >= majority - (0.02 if skew else 0.03)


def test_labels_that_noise_hides_have_the_centre_as_mean() -> None:
    """So that they differ by their shares alone, where means of noise would be chosen for all texts."""
    rows, drawn = mixture(1, 6, 3.0, 0.8)
    sums = private_sums(rows, drawn, 6)
    weight, bias = solved(*noised(sums, 20.0, 0), 20.0)
    assert float(sums["counts"][5]) < 20
    lengths = np.linalg.norm(weight, axis=1)
    assert lengths[5] < 0.2 * lengths[0]
    logits = rows.numpy() @ weight.T + bias
    assert (logits.argmax(axis=1) == 5).mean() < 0.01


def test_expected_counts_are_those_of_a_cut_normal_distribution() -> None:
    from scipy import stats

    given_ = torch.tensor([-300.0, -5.0, 0.0, 3.0, 500.0], dtype=torch.float64)
    found = _expected_counts(given_, 10.0)
    for value, expected in zip(given_.tolist(), found.tolist(), strict=True):
        cut = stats.truncnorm(-value / 10, np.inf, loc=value, scale=10)
        assert expected == pytest.approx(cut.mean(), rel=1e-3)
    assert _expected_counts(given_, 0.0).tolist() == [0, 0, 0, 3, 500]


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
