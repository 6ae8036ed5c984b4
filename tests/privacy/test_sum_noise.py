"""Noise of clients in a secure sum: the norm of integers, how noise is divided, and room for the sum."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcustom.core.errors import RecipeError
from fedcustom.privacy.client_mechanism import ClientMechanism, client_mechanism
from fedcustom.privacy.record import client_record
from fedcustom.privacy.secure_sum.terms import Terms
from fedcustom.privacy.settings import PrivacySettings
from fedcustom.privacy.skellam import largest
from fedcustom.privacy.sum_noise import ROOM, SCALE, SumNoise, factor_of, is_within, rounded
from fedcustom.privacy.words import client_words


@given(st.integers(1, 3000), st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=60, deadline=None)
def test_no_group_of_integers_is_longer_than_the_scale(count: int, seed: int, spread: bool) -> None:
    """Exactly, whatever the direction: one number alone, all alike, or none."""
    values = np.random.default_rng(seed).normal(size=count) if spread else np.eye(1, count, seed % count)[0]
    values /= np.linalg.norm(values)
    for vector in (values, -values, np.full(count, count**-0.5), np.zeros(count)):
        found = rounded(vector, seed.to_bytes(4, "little"))
        assert sum(int(number) ** 2 for number in found) <= SCALE**2
        assert np.abs(found - vector * factor_of(count)).max() <= 1
    assert is_within(np.array([SCALE], np.int64))
    assert not is_within(np.array([SCALE, 1], np.int64))
    assert not is_within(np.full(4, 2**62, np.int64)), "no overflow"


def test_rounding_is_right_on_average() -> None:
    vector = np.array([0.3, 0.123456789, -0.5, 0.0])
    mean = np.mean([rounded(vector, n.to_bytes(4, "little")) for n in range(4000)], axis=0)
    assert np.abs(mean - vector * factor_of(4)).max() < 0.05
    with pytest.raises(ValueError, match="norm above 1"):
        rounded(np.array([1.1]), b"")
    with pytest.raises(ValueError, match="norm above 1"):
        rounded(np.array([np.nan]), b"")
    with pytest.raises(ValueError, match="too many"):
        factor_of(2**40)
    assert 1 - factor_of(76_000) / SCALE == pytest.approx(0.0021, abs=1e-4)
    assert 1 - factor_of(22_700_000) / SCALE == pytest.approx(0.036, abs=1e-3)


@pytest.mark.parametrize("colluding", [0, 1, 3])
@pytest.mark.parametrize("count", [5, 7, 10])
def test_whoever_drops_out_and_whoever_colludes_the_promised_noise_is_left(
    count: int, colluding: int
) -> None:
    """Of every set of survivors that a sum may be of, and every set of colluders among them."""
    terms = Terms(colluding=colluding)
    noise = SumNoise(1.3, terms, groups=2)
    needed = terms.needed(count)
    each = noise.variance(needed)
    least = min(
        each * len(set(survivors) - set(colluders))
        for left in range(needed, count + 1)
        for survivors in itertools.combinations(range(count), left)
        for colluders in itertools.combinations(survivors, colluding)
    )
    assert least == pytest.approx(noise.total)
    assert noise.total == pytest.approx(2 * (1.3 * 2**16) ** 2)


@given(st.integers(3, 64), st.integers(0, 6), st.floats(0.01, 120))
@settings(max_examples=80, deadline=None)
def test_sums_never_wrap(count: int, colluding: int, z: float) -> None:
    """What fits does so with the largest change and noise of every client, in every smaller sum."""
    noise = SumNoise(z, Terms(colluding=colluding), groups=2)
    if not noise.fits(count):
        assert z > 90, "below it, all sums of up to 64 clients fit"
        return
    for clients in range(3, count + 1):
        if (clients + colluding) // 2 + 1 > clients or colluding + 2 > clients:
            continue
        each = SCALE + largest(noise.variance(noise.terms.needed(clients)))
        assert clients * each <= ROOM
        total = np.full(1, each, np.int64).astype(np.uint32) * np.uint32(clients)
        assert total.view(np.int32)[0] == clients * each


def mechanism(
    clients: int = 10, asked: int = 10, terms: Terms | None = None, rounds: int = 8, **more: Any
) -> ClientMechanism:
    section = PrivacySettings.model_validate(
        {"unit": "client", "noise": "sum", "epsilon": 8.0, "delta": 1e-3} | more
    )
    return client_mechanism(
        section,
        clients=clients,
        clients_per_round=asked,
        factors=[1.0] * rounds,
        terms=terms or Terms(),
    )


def test_the_mechanism_of_a_run() -> None:
    found = mechanism()
    assert found.coefficients == (1.0,)
    assert found.guarantee().epsilon == 8.0
    assert found.epsilon(8, 0) <= 8
    assert found.epsilon(8, 0) == pytest.approx(8, rel=1e-5)
    assert found.epsilon(1, 0) < found.epsilon(2, 0) < 8
    assert (found.noise_multiplier * 1e6) == pytest.approx(round(found.noise_multiplier * 1e6))
    # Ten answer where six are counted on.
    assert found.last_state_noise == pytest.approx(found.noise_multiplier * (10 / 6) ** 0.5)
    in_turn = mechanism(clients=20, asked=10)
    assert in_turn.participation.turns == 4
    assert in_turn.noise_multiplier < found.noise_multiplier
    assert any("secure_sum.colluding = 1: no more" in text for text in found.guarantee().assumptions)
    assert not any("trusted: it sees" in text for text in found.guarantee().assumptions)


def test_what_is_said_of_it() -> None:
    record = client_record(mechanism())
    assert (record["noise"], record["colluding"], record["integer_norm"]) == ("sum", 1, 65536)
    assert 6.5 < record["epsilon_if_normal"] < 8
    assert record["against"] == [
        "the server, whether or not it follows the protocol",
        "the server with clients that help it, up to 1 in a round",
        "other clients",
        "whoever has the model",
    ]
    alone = client_record(mechanism(terms=Terms(colluding=0)))
    assert "other clients" not in alone["against"], "each knows its own noise"
    text = "\n".join(f"{name}: {said}" for name, said in client_words(mechanism()))
    assert "against: the server, whether or not" in text
    assert "of 10 in a round 7 have to stay, and the noise of 6 of them is enough" in text
    assert "in a test" not in text


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"clients": 5, "asked": 3}, "rounds.clients_per_round"),  # groups of three and two
        ({"clients": 2, "asked": 2, "delta": 1e-2}, "rounds.clients_per_round"),
        ({"terms": Terms(colluding=9)}, "rounds.clients_per_round"),
        ({"epsilon": 0.01, "rounds": 80}, "privacy.epsilon"),
        ({"epsilon": None, "noise_multiplier": 500.0}, "privacy.noise_multiplier"),
        ({"delta": 0.02}, "privacy.delta"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_key(more: dict[str, Any], key: str) -> None:
    with pytest.raises(RecipeError, match=key):
        mechanism(**more)
