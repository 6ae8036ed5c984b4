"""The mechanism of a run: its noise is the least that its guarantee needs, and what it spends by round."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from pydantic import ValidationError

from fedcustom.core.errors import RecipeError
from fedcustom.privacy.accounting import Event, Ledger, gaussian_epsilon, gaussian_mu
from fedcustom.privacy.client_mechanism import ClientMechanism, client_mechanism
from fedcustom.privacy.record import client_record
from fedcustom.privacy.settings import PrivacySettings

FALLING = [1 - t / 80 for t in range(80)]


def settings(**more: Any) -> PrivacySettings:
    return PrivacySettings.model_validate({"unit": "client", "epsilon": 8.0, "delta": 1e-5} | more)


def mechanism(head_fits: int = 0, clients: int = 1000, asked: int = 100, **more: Any) -> ClientMechanism:
    return client_mechanism(
        settings(**more),
        clients=clients,
        clients_per_round=asked,
        factors=FALLING,
        momentum=0.9,
        head_fits=head_fits,
    )


@pytest.mark.parametrize(("epsilon", "left"), [(8.0, 0.583), (2.0, 1.94)])
def test_the_specifications_figures(epsilon: float, left: float) -> None:
    found = mechanism(epsilon=epsilon)
    assert found.noise_multiplier == pytest.approx(math.sqrt(8) / gaussian_mu(epsilon, 1e-5))
    assert found.last_state_noise == pytest.approx(left, abs=5e-3)
    assert found.guarantee().epsilon == epsilon
    assert found.guarantee().valid


def test_what_is_spent_rises_with_a_clients_turns() -> None:
    found = mechanism()
    mu = gaussian_mu(8, 1e-5)
    assert found.epsilon(0, 0) == 0
    assert (
        found.epsilon(10, 0)
        == found.epsilon(1, 0)
        == pytest.approx(gaussian_epsilon(mu / math.sqrt(8), 1e-5), rel=1e-6)
    )
    assert found.epsilon(11, 0) == pytest.approx(gaussian_epsilon(mu / 2, 1e-5), rel=1e-6)
    assert found.epsilon(80, 0) == pytest.approx(8, rel=1e-6)
    assert found.epsilon(80, 0) <= 8


def test_the_head_takes_its_share() -> None:
    one, two = mechanism(head_fits=1), mechanism(head_fits=2)
    mu = gaussian_mu(8, 1e-5)
    for found, fits in ((one, 1), (two, 2)):
        assert found.head_noise is not None
        assert fits / found.head_noise**2 == pytest.approx(0.13 * mu**2)
        assert 8 / found.noise_multiplier**2 == pytest.approx(0.87 * mu**2)
        assert found.epsilon(80, fits) == pytest.approx(8, rel=1e-6)


def test_a_given_noise_multiplier_decides_epsilon() -> None:
    found = mechanism(epsilon=None, noise_multiplier=2.0)
    assert found.guarantee().epsilon == pytest.approx(gaussian_epsilon(math.sqrt(8) / 2, 1e-5))
    with_head = mechanism(head_fits=1, epsilon=None, noise_multiplier=2.0)
    assert with_head.head_noise is not None
    assert (1 / with_head.head_noise**2) / (1 / with_head.head_noise**2 + 2) == pytest.approx(0.13)


def test_poisson_is_accounted_with_its_sampling_and_has_independent_noise() -> None:
    found = mechanism(participation="poisson", epsilon=None, noise_multiplier=2.063, head_fits=1)
    assert found.coefficients == (1.0,)
    assert found.head_noise is not None
    expected = Ledger((Event(2.063, 80, 0.1), Event(found.head_noise))).epsilon(1e-5)
    assert found.guarantee().epsilon == pytest.approx(expected)
    assert found.epsilon(80, 0) == pytest.approx(2.0, abs=0.01)
    assert any("poisson" in text for text in found.guarantee().assumptions)


def test_everybody_in_each_round_has_independent_noise() -> None:
    found = mechanism(clients=100, asked=100)
    assert found.coefficients == (1.0,)
    assert found.noise_multiplier == pytest.approx(math.sqrt(80) / gaussian_mu(8, 1e-5))


def test_adaptive_bounds_take_two_percent() -> None:
    """Sums of two groups with an indicator each: together as private as the noise multiplier says."""
    found = mechanism(clip="adaptive", clip_head="adaptive", participation="poisson")
    z, groups = found.noise_multiplier, 2
    of_sum = groups / found.sum_noise(groups, adaptive=2) ** 2
    of_indicators = groups * 0.25 / found.indicator_noise**2
    assert of_sum + of_indicators == pytest.approx(1 / z**2)
    assert of_indicators * z**2 == pytest.approx(0.02)
    assert found.sum_noise(2) == pytest.approx(z * math.sqrt(2))


def test_the_record_says_everything_in_json() -> None:
    found = json.loads(json.dumps(client_record(mechanism(head_fits=1)), allow_nan=False))
    assert {"unit", "epsilon", "delta", "valid", "never_promised"} <= found.keys()
    assert (found["unit"], found["epsilon"], found["delta"], found["valid"]) == ("client", 8, 1e-5, True)
    assert found["participation"]["turns"] == 8
    assert not client_record(mechanism(randomness="seeded"))["valid"]


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"delta": 1e-3}, "privacy.delta"),
        ({"bands": 11}, "privacy.bands"),
        ({"clip": "adaptive"}, "privacy.clip"),
        ({"clip_head": "adaptive"}, "privacy.clip_head"),
        ({"clip": "adaptive", "participation": "poisson", "epsilon": 1.0, "asked": 50}, "privacy.clip"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_key(more: dict[str, Any], key: str) -> None:
    with pytest.raises(RecipeError, match=key):
        mechanism(**more)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"epsilon": 1.0}, "epsilon"),
        ({"unit": "client", "delta": 1e-5}, "epsilon"),
        ({"unit": "client", "epsilon": 1.0, "noise_multiplier": 1.0, "delta": 1e-5}, "epsilon"),
        ({"unit": "client", "epsilon": 1.0}, "delta"),
        ({"unit": "client", "epsilon": 0.0, "delta": 1e-5}, "epsilon"),
        ({"unit": "client", "epsilon": 1.0, "delta": 1.0}, "delta"),
        ({"unit": "client", "epsilon": 1.0, "delta": 1e-5, "noise": "site"}, "noise"),
        ({"unit": "example", "epsilon": 1.0, "delta": 1e-5, "noise": "sum"}, "noise"),
        ({"unit": "client", "epsilon": 1.0, "delta": 1e-5, "clip": 0.0}, "clip"),
        ({"unit": "client", "epsilon": 1.0, "delta": 1e-5, "clip": "none"}, "clip"),
        ({"unit": "client", "epsilon": 1.0, "delta": 1e-5, "participation": "poisson", "bands": 2}, "bands"),
        ({"unit": "client", "epsilon": 1.0, "delta": 1e-5, "head_share": 1.0}, "head_share"),
    ],
)
def test_impossible_sections_are_refused_by_their_key(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ValidationError, match=key):
        PrivacySettings.model_validate(values)
