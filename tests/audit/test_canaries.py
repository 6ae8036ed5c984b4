"""Canaries measure what a mechanism promises, and find noise that is too small."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm

from fedcustom.audit.attack import CannotAttack, Deadline, OutOfTime
from fedcustom.audit.canaries import CANARIES, ReleaseOf, statistics_of
from fedcustom.audit.statistics import epsilon_bound, gaussian_separation
from fedcustom.privacy.accounting import gaussian_epsilon
from fedcustom.privacy.client_mechanism import ClientMechanism, client_mechanism
from fedcustom.privacy.noise import NoiseKey
from fedcustom.privacy.settings import PrivacySettings

LATER = Deadline(float("inf"))
DELTA = 1e-5


def mechanism(*, head_fits: int = 0, clients: int = 400, **settings: Any) -> ClientMechanism:
    """Twenty rounds of a tenth of the clients."""
    privacy = PrivacySettings(unit="client", delta=DELTA, **settings)
    return client_mechanism(
        privacy,
        clients=clients,
        clients_per_round=clients // 10,
        factors=[1 - n / 25 for n in range(20)],
        momentum=0.9,
        head_fits=head_fits,
    )


def release(found: ClientMechanism, seed: int = 0) -> ReleaseOf:
    """Of a model with two tensors and a head."""
    fits = (1,) if found.head_fits else ()
    return ReleaseOf(
        found,
        NoiseKey.seeded(seed),
        {"a": torch.zeros(60, 20), "b": torch.zeros(900), "head": torch.zeros(6, 300)},
        frozenset({"head"}),
        {n + 1 + len(fits): 1 - n / 25 for n in range(20)},
        fits,
        {"counts": torch.zeros(6), "totals": torch.zeros(6, 300)} if fits else {},
        0,
    )


@pytest.mark.parametrize(
    ("settings", "fits"),
    [({}, 0), ({"bands": 1}, 0), ({"clip": 0.3, "clip_head": 2.0}, 0), ({}, 1), ({"head_share": 0.8}, 1)],
)
def test_the_distance_is_what_the_accounting_says(settings: dict[str, Any], fits: int) -> None:
    """mu is 1.667 at epsilon 8 and delta 1e-5, however it is shared; four standard errors on either side."""
    found = mechanism(epsilon=8.0, head_fits=fits, **settings)
    assert found.ledger(20, fits).mu == pytest.approx(1.667, abs=1e-3)
    seen = statistics_of(release(found), LATER)
    assert len(seen.members) == len(seen.others) == len(seen.shares) == CANARIES
    assert seen.shares.max() == pytest.approx(1.0)
    apart, least = gaussian_separation(seen.members, seen.others, 0.999, seen.shares)
    assert apart == pytest.approx(1.667, abs=4 * 0.14)
    assert seen.others.mean() == pytest.approx(0.0, abs=4 / CANARIES**0.5)
    assert seen.others.std() == pytest.approx(1.0, abs=0.3)  # with the other canaries in the sum
    assert gaussian_epsilon(least, DELTA) < 8.0


def test_noise_that_is_halved_is_found() -> None:
    found = mechanism(epsilon=8.0)
    halved = replace(found, noise_multiplier=found.noise_multiplier / 2)
    seen = statistics_of(release(halved), LATER)
    _, least = gaussian_separation(seen.members, seen.others, 0.999, seen.shares)
    assert gaussian_epsilon(least, DELTA) > 8.0


def test_a_bound_that_is_not_kept_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes that are not cut are a hundred times as long."""
    import fedcustom.aggregation.private_mean as private_mean
    from fedcustom.privacy.clipping import Bounded

    def uncut(tensors: Any, groups: Any, bounds: Any) -> Bounded:
        return Bounded({n: t.double() for n, t in tensors.items()}, dict.fromkeys(groups, 1.0))

    monkeypatch.setattr(private_mean, "bounded", uncut)
    seen = statistics_of(release(mechanism(epsilon=8.0)), LATER)
    _, least = gaussian_separation(seen.members, seen.others, 0.999, seen.shares)
    assert gaussian_epsilon(least, DELTA) > 8.0


def test_sampling_is_not_known_to_the_attacker() -> None:
    found = mechanism(epsilon=8.0, participation="poisson")
    seen = statistics_of(release(found), LATER)
    assert (seen.shares == 1).all()
    assert seen.members.mean() > seen.others.mean()
    apart, _ = gaussian_separation(seen.members, seen.others, 0.999)
    assert apart < found.ledger(20, 0).epsilon(DELTA)


def test_too_few_clients_and_too_little_time() -> None:
    few = mechanism(epsilon=8.0, clients=400)
    few = replace(few, participation=replace(few.participation, clients=9))
    with pytest.raises(CannotAttack, match="9 clients are too few"):
        statistics_of(release(few), LATER)
    with pytest.raises(OutOfTime):
        statistics_of(release(mechanism(epsilon=8.0)), Deadline(0.0))


def test_the_bound_on_a_distance_holds_as_often_as_it_says() -> None:
    draw, wrong = np.random.default_rng(0), 0
    for _ in range(1000):
        members, others = draw.normal(1.7, 1, 200), draw.normal(0, 1, 200)
        apart, least = gaussian_separation(members, others, 0.9)
        assert least < apart
        wrong += least > 1.7
    assert wrong <= 100 + 4 * 9.5
    assert wrong >= 40


def test_a_swap_is_two_steps() -> None:
    """Without delta a bound by pairs is half of that by fair coins; with it, smaller."""
    assert epsilon_bound(90, 100, 100, 0.0, swapped=True) == pytest.approx(
        epsilon_bound(90, 100, 100, 0.0) / 2, abs=1e-6
    )
    assert epsilon_bound(90, 100, 100, 1e-4, swapped=True) < epsilon_bound(90, 100, 100, 1e-4) / 2


def test_mu_of_the_gaussian_curve() -> None:
    """Of two normal distributions mu apart, at epsilon of that mu the curve gives delta."""
    epsilon = gaussian_epsilon(1.5, DELTA)
    right = norm.cdf(0.75 - epsilon / 1.5) - np.exp(epsilon) * norm.cdf(-0.75 - epsilon / 1.5)
    assert right == pytest.approx(DELTA, rel=1e-6)
