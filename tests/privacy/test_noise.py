"""Noise by a key: standard normal, repeatable, and another for every key, round and name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from fedcustom.privacy.noise import NoiseKey


def test_numbers_are_standard_normal_and_uniform() -> None:
    key = NoiseKey.fresh()
    assert stats.kstest(key.normal(3, "a", 200_000), "norm").pvalue > 1e-4
    assert stats.kstest(key.uniform(3, "a", 200_000), "uniform").pvalue > 1e-4
    pairs = key.normal(4, "a", 200_000).reshape(2, -1)  # the two of one Box-Muller pair
    assert abs(np.corrcoef(pairs)[0, 1]) < 0.02
    assert abs(np.corrcoef(pairs**2)[0, 1]) < 0.02


def test_numbers_depend_on_key_round_and_name_alone() -> None:
    key, same, other = NoiseKey(bytes(32)), NoiseKey(bytes(32)), NoiseKey(bytes(31) + b"\1")
    first = key.normal(1, "a", 1001)
    assert np.array_equal(first, same.normal(1, "a", 1001))
    for another in (other.normal(1, "a", 1001), key.normal(2, "a", 1001), key.normal(1, "b", 1001)):
        assert abs(np.corrcoef(first, another)[0, 1]) < 0.15
        assert not np.isin(first, another).any()


def test_tensors_have_noise_by_their_own_names() -> None:
    key = NoiseKey.fresh()
    both = key.normal_like(1, "noise", {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.float16)})
    alone = key.normal_like(1, "noise", {"b": torch.zeros(4)})
    assert torch.equal(both["b"], alone["b"])
    assert both["a"].shape == (2, 3)
    assert both["b"].dtype == torch.float64


def test_keys_are_not_shown_and_seeded_ones_are_no_secret() -> None:
    key = NoiseKey.fresh()
    assert key.secret
    assert key.key.hex() not in repr(key)
    assert repr(key.key) not in repr(key)
    assert NoiseKey.seeded(1) == NoiseKey.seeded(1) != NoiseKey.seeded(2)
    assert not NoiseKey.seeded(1).secret
    with pytest.raises(ValueError, match="32 bytes"):
        NoiseKey(b"short")
