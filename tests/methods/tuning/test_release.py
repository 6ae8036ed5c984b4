"""A round whose mean is noised, through the verbs of a method."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedcustom.core.tensors import Tensors, equal, norm
from fedcustom.data.examples import ClientData
from fedcustom.methods import Answer, Client, State, Update, WeightTuning, Work
from fedcustom.methods.tuning.messages import TrainUpdate
from fedcustom.methods.tuning.release import ClientRelease
from fedcustom.privacy.client_mechanism import client_mechanism
from fedcustom.privacy.clipping import groups_of
from fedcustom.privacy.noise import NoiseKey
from fedcustom.privacy.settings import PrivacySettings
from helpers.methods import SETTINGS, examples_for, make

KEY = NoiseKey.seeded(3)
CLIENTS = 4


def release_of(rounds: int = 4, asked: int = CLIENTS, noise: float = 1e-6, **more: Any) -> ClientRelease:
    settings = PrivacySettings.model_validate(
        {"unit": "client", "noise_multiplier": noise, "delta": 1e-3} | more
    )
    mechanism = client_mechanism(
        settings, clients=CLIENTS, clients_per_round=asked, factors=[1.0] * rounds, momentum=0.0
    )
    return ClientRelease(mechanism, KEY, ())


def method_of(
    tiny: dict[str, str], release: ClientRelease | None, which: str = "prefix", **training: Any
) -> WeightTuning:
    found = make(tiny["bert"], which.split()[0], training={"optimizer": "sgd", **training}, **SETTINGS[which])
    privacy = release_of().mechanism.settings if release is None else release.mechanism.settings
    context = replace(found.context, privacy=privacy, release=release, rounds=4)
    for side in (found.server.parts, found.client.parts):
        side.context = context
    found.context = context
    return found


def clients() -> dict[str, Client]:
    examples = examples_for("classification")
    return {
        f"c{i}": Client(f"c{i}", ClientData(f"c{i}", examples[2 * i : 2 * i + 2])) for i in range(CLIENTS)
    }


def answers_of(method: WeightTuning, state: State, number: int = 1) -> list[Answer]:
    tasks = method.configure(state, number, {name: Work(epochs=1) for name in clients()})
    pairs = [(tasks[name], client) for name, client in clients().items()]
    updates = method.execute_together(pairs)
    answers = []
    for (name, task), update in zip(tasks.items(), updates, strict=True):
        assert isinstance(update, Update), update
        method.check(task, update)
        answers.append(Answer(name, task, update))
    return answers


def moved(before: State, after: State) -> Tensors:
    return {name: after.tensors[name] - tensor for name, tensor in before.tensors.items()}


def groups_moved(method: WeightTuning, change: Tensors) -> dict[str, float]:
    groups = groups_of(change, method.trainable.head)
    return {group: norm({name: change[name] for name in names}) for group, names in groups.items()}


def test_without_noise_it_is_the_mean_of_unit_changes(tiny: dict[str, str]) -> None:
    method = method_of(tiny, release_of(noise=1e-9))
    state = method.initialise()
    answers = answers_of(method, state)
    expected: Tensors = {}
    for answer in answers:
        for names in groups_of(answer.update.tensors, method.trainable.head).values():
            part = {name: answer.update.tensors[name] for name in names}
            for name, tensor in part.items():
                expected[name] = expected.get(name, 0) + tensor / norm(part) / CLIENTS
    found = moved(state, method.aggregate(state, answers).state)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("clip", ["unit", 1e-3])
@pytest.mark.parametrize("which", ["prefix", "lora", "lora ffa", "lora fedsvd", "bitfit"])
def test_no_client_moves_the_state_by_more_than_its_bound(
    tiny: dict[str, str], clip: str | float, which: str
) -> None:
    method = method_of(tiny, release_of(clip=clip, clip_head=clip), which)
    state = method.initialise()
    answers = answers_of(method, state)
    bound = 1.0 if clip == "unit" else 1e-3
    before = method.aggregate(state, answers).state
    for factor in (1e6, -1e6):
        tensors = {name: factor * tensor for name, tensor in answers[0].update.tensors.items()}
        hostile = replace(answers[0], update=replace(answers[0].update, tensors=tensors))
        after = method.aggregate(state, [hostile, *answers[1:]]).state
        for found in groups_moved(method, moved(before, after)).values():
            assert found * CLIENTS <= 2 * bound * 1.001
    absent = method.aggregate(state, answers[1:]).state
    for found in groups_moved(method, moved(before, absent)).values():
        assert found * CLIENTS <= bound * 1.001


def test_clients_clip_what_they_send(tiny: dict[str, str]) -> None:
    method = method_of(tiny, release_of(clip=1e-7, clip_head="unit"), schedule="linear")
    state = method.initialise()
    for number, factor in ((1, 1.0), (3, 0.5)):
        for answer in answers_of(method, state, number):
            found = groups_moved(method, dict(answer.update.tensors))
            assert found["own"] == pytest.approx(1e-7 * factor, rel=1e-4)
            assert found["head"] == pytest.approx(factor, rel=1e-4)


def test_adaptive_bounds_are_the_servers_and_go_on_in_the_state(tiny: dict[str, str]) -> None:
    release = release_of(clip="adaptive", clip_head="unit")  # 50 clients at noise 1
    method = method_of(tiny, release)
    state = method.initialise()
    first = method.aggregate(state, answers_of(method, state)).state
    assert first.values["bound/own"] != 0.1
    assert first.values["bound/own"] == pytest.approx(0.1, rel=0.2)
    assert "bound/head" not in first.values


@pytest.mark.parametrize("which", ["prefix", "lora"])
def test_a_cohort_is_as_one_client_after_another(tiny: dict[str, str], which: str) -> None:
    method = method_of(tiny, release_of(noise=0.5), which)
    method.base.model.double()
    state = method.initialise()
    together = method.aggregate(state, answers_of(method, state)).state
    tasks = method.configure(state, 1, {name: Work(epochs=1) for name in clients()})
    alone = [Answer(name, tasks[name], method.execute(tasks[name], c)) for name, c in clients().items()]
    apart = method.aggregate(state, alone).state
    for name, tensor in together.tensors.items():
        torch.testing.assert_close(tensor, apart.tensors[name], atol=1e-5, rtol=1e-4)


def test_noise_is_that_of_the_mechanism_and_of_the_round(tiny: dict[str, str]) -> None:
    """With clients that send nothing, the state is moved by noise alone."""
    release = release_of(rounds=4, asked=2, noise=2.0)
    assert len(release.mechanism.coefficients) == 2
    method = method_of(tiny, release, "full")
    state = method.initialise()
    (task,) = method.configure(state, 1, {"a": Work(epochs=1)}).values()
    zeros = {name: torch.zeros_like(tensor) for name, tensor in method.ownership.wanted(task).items()}
    rows = []
    for number in range(1, 5):
        (task,) = method.configure(state, number, {"a": Work(epochs=1)}).values()
        update = TrainUpdate(zeros, 1.0, loss=1.0, examples=1, steps=1)
        found = moved(state, method.aggregate(state, [Answer("a", task, update)]).state)
        rows.append(torch.cat([tensor.flatten() for tensor in found.values()]).double())
    noise = torch.stack(rows) * 2  # two clients a round
    count = noise.shape[1]
    c = release.mechanism.coefficients
    column = torch.zeros(4, 4, dtype=torch.float64)
    for j, value in enumerate(c):
        column += value * torch.diag(torch.ones(4 - j, dtype=torch.float64), -j)
    inverse = torch.linalg.inv(column)
    expected = 2.0**2 * 2 * inverse @ inverse.T  # z squared, two groups
    assert count > 20_000
    torch.testing.assert_close(noise @ noise.T / count, expected, rtol=0.06, atol=0.15)
    again = method_of(tiny, release_of(rounds=4, asked=2, noise=2.0), "full")
    (task,) = again.configure(state, 3, {"a": Work(epochs=1)}).values()
    update = TrainUpdate(zeros, 1.0, loss=1.0, examples=1, steps=1)
    resumed = moved(state, again.aggregate(state, [Answer("a", task, update)]).state)
    torch.testing.assert_close(
        torch.cat([tensor.flatten() for tensor in resumed.values()]).double(), rows[2], rtol=0, atol=0
    )


def test_who_has_no_key_releases_nothing(tiny: dict[str, str]) -> None:
    method = method_of(tiny, None)
    state = method.initialise()
    answers = answers_of(method, state)
    with pytest.raises(RuntimeError, match="no key"):
        method.aggregate(state, answers)


def test_a_head_that_rests_takes_no_noise(tiny: dict[str, str]) -> None:
    method = method_of(tiny, release_of(noise=1.0), freeze_head_rounds=4)
    state = method.initialise()
    found = moved(state, method.aggregate(state, answers_of(method, state)).state)
    assert not any(found[name].any() for name in method.trainable.head)
    assert all(found[name].any() for name in found if name not in method.trainable.head)
    assert equal({n: state.tensors[n] for n in found}, state.tensors)
