"""Changes that each client noises for itself: sensitivity by brute force, noise, and the server's mean."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedcustom.core.errors import UpdateError
from fedcustom.core.tensors import Tensors
from fedcustom.methods.tuning.messages import TrainTask, TrainUpdate
from fedcustom.methods.tuning.release import OwnNoise
from fedcustom.methods.tuning.update_checks import check_figures
from fedcustom.privacy.accounting import gaussian_epsilon
from fedcustom.privacy.client_mechanism import client_mechanism
from fedcustom.privacy.noise import NoiseKey
from fedcustom.privacy.settings import PrivacySettings

FORMS = {"own.a": (3, 5), "own.b": (7,), "head.w": (2, 3)}
HEAD = frozenset({"head.w"})


def noise(z: float = 1.0, **more: Any) -> OwnNoise:
    section = PrivacySettings.model_validate(
        {"unit": "client", "noise": "client", "noise_multiplier": z, "delta": 1e-3} | more
    )
    found = client_mechanism(section, clients=8, clients_per_round=4, factors=[1.0] * 4)
    return OwnNoise(found, NoiseKey.seeded(2).of)


def change(seed: int, size: float = 1.0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(form, generator=generator) * size for name, form in FORMS.items()}


def noised(given: Tensors, own: OwnNoise, number: int = 1, client: str = "a", factor: float = 1.0) -> Tensors:
    return own.noised(given, head=HEAD, groups=2, round_number=number, factor=factor, client=client)


def lengths(change: Tensors) -> dict[bool, float]:
    return {
        head: math.hypot(*(float(t.norm()) for name, t in change.items() if (name in HEAD) == head))
        for head in (True, False)
    }


@pytest.mark.parametrize(("clip", "bound"), [("unit", 0.5), (0.2, 0.1)])
@pytest.mark.parametrize("size", [1e-9, 1.0, 1e6])
def test_a_client_moves_what_it_sends_by_its_bound_at_most(clip: Any, bound: float, size: float) -> None:
    """Against zeros in its place, with the same noise, in a round with the schedule's factor of a half."""
    own = noise(clip=clip, clip_head=clip)
    nothing = noised(change(0, 0.0), own, factor=0.5)
    for seed in range(10):
        found = noised(change(seed, size), own, factor=0.5)
        moved = lengths({name: tensor - nothing[name] for name, tensor in found.items()})
        assert max(moved.values()) <= bound * (1 + 1e-5)
        if clip == "unit":
            assert min(moved.values()) >= bound * (1 - 1e-5)


def test_the_noise_is_for_one_client_alone() -> None:
    own = noise(z=3.0, clip=0.5)
    long = {"own.a": torch.zeros(50_000), "head.w": torch.zeros(50_000)}
    found = noised(long, own)
    assert float(found["own.a"].std()) == pytest.approx(3 * math.sqrt(2) * 0.5, rel=0.02)
    assert float(found["head.w"].std()) == pytest.approx(3 * math.sqrt(2), rel=0.02)
    assert own.length(50_000, 2) == pytest.approx(float(found["head.w"].norm()), rel=0.02)
    assert found["own.a"].dtype == torch.float32
    for other in (noised(long, own, number=2), noised(long, own, client="b")):
        assert abs(float(torch.corrcoef(torch.stack([found["own.a"], other["own.a"]]))[0, 1])) < 0.03
    with pytest.raises(UpdateError, match=r"privacy\.noise = 'client': this party has no key"):
        noised(long, replace(own, keys=None))


def test_the_server_adds_up_and_divides_by_the_clients_of_a_round() -> None:
    """What is longer than a bound is its noise: nothing is cut."""
    found = noise().mean(iter([change(1, 5.0), change(2, 7.0)]))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (change(1, 5.0)[name] + change(2, 7.0)[name]) / 4)


def test_each_turn_is_a_release_with_an_exact_curve() -> None:
    mechanism = noise(z=2.0).mechanism
    assert mechanism.guarantee().epsilon == pytest.approx(gaussian_epsilon(math.sqrt(2) / 2, 1e-3))
    assert mechanism.last_state_noise == pytest.approx(2.0 * 2.0), "of four clients"
    assert mechanism.against[0].startswith("the server")
    assert mechanism.gaussian_epsilon() is None
    with pytest.raises(ValueError, match="the server's"):
        mechanism.sum_noise_of(2)


def test_no_loss_is_told() -> None:
    task = TrainTask({}, round_number=1, learning_rate_factor=1.0)
    update = TrainUpdate({}, 8.0, loss=None, examples=8, steps=2)
    check_figures(task, update, 4, hides_loss=True)
    with pytest.raises(UpdateError, match="whose client is hidden"):
        check_figures(task, replace(update, loss=1.0), 4, hides_loss=True)
    with pytest.raises(UpdateError, match="training loss None"):
        check_figures(task, update, 4)
