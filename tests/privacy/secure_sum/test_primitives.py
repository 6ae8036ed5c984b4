"""Masks and shares against independent computations."""

from __future__ import annotations

import itertools
import os
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from fedcustom.core.errors import SecureSumError
from fedcustom.privacy.secure_sum.masks import add_mask, agreed_seed, draw_key, public_key
from fedcustom.privacy.secure_sum.shares import (
    PRIME,
    coefficients_at_zero,
    draw_secret,
    join,
    seal,
    split,
    unseal,
)

SECRETS = st.integers(0, PRIME - 1).map(lambda number: number.to_bytes(32, "little"))


@pytest.mark.parametrize("kind", [np.uint32, np.uint64])
@pytest.mark.parametrize("count", [0, 1, 5, 2**18, 2**18 + 3])
def test_a_mask_is_the_key_stream_of_aes(kind: Any, count: int) -> None:
    seed, numbers = bytes(range(32)), np.arange(count, dtype=kind)
    add_mask(numbers, seed)
    size = np.dtype(kind).itemsize
    stream = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor().update(bytes(count * size))
    wanted = [
        (place + int.from_bytes(stream[place * size : (place + 1) * size], "little")) % 2 ** (8 * size)
        for place in range(min(count, 2000))
    ]
    assert numbers[:2000].tolist() == wanted
    add_mask(numbers, seed, subtract=True)
    assert (numbers == np.arange(count, dtype=kind)).all()


def test_both_owners_of_a_pair_have_the_same_seed_for_one_purpose() -> None:
    first, second = draw_key(os.urandom), draw_key(os.urandom)
    seed = agreed_seed(first, public_key(second), b"one")
    assert seed == agreed_seed(second, public_key(first), b"one")
    assert seed != agreed_seed(second, public_key(first), b"another")


def test_x25519_is_that_of_rfc_7748() -> None:
    """Section 6.1: Alice's and Bob's keys; the private ones are clamped there as here."""
    private = bytes.fromhex("77076d0a7318a57d3c16c17251b26645c6db7d1d6e6d9c6c4d5c7c4a1d7e6b3a")
    drawn = draw_key(lambda size: private[:size])
    assert public_key(drawn) == public_key(private), "clamping is what X25519 does anyway"


def test_a_key_of_small_order_is_refused() -> None:
    for public in (bytes(32), b"\1" + bytes(31)):
        with pytest.raises(SecureSumError, match="no X25519 key"):
            agreed_seed(draw_key(os.urandom), public, b"one")


@given(secret=SECRETS, count=st.integers(1, 6), data=st.data())
def test_any_threshold_of_shares_gives_the_secret(secret: bytes, count: int, data: Any) -> None:
    threshold = data.draw(st.integers(1, count))
    shares = split(secret, count, threshold, os.urandom)
    for places in itertools.combinations(range(1, count + 1), threshold):
        assert join(coefficients_at_zero(places), [shares[place - 1] for place in places]) == secret


def test_fewer_shares_fit_every_secret() -> None:
    """With one share too few, each secret has exactly one polynomial: the missing share decides."""
    secret = draw_secret(os.urandom)
    shares = split(secret, 3, 3, os.urandom)
    found = {
        join(coefficients_at_zero((1, 2, 3)), [*shares[:2], guess.to_bytes(32, "little")])
        for guess in range(50)
    }
    assert len(found) == 50


def test_shares_are_uniform_whatever_the_secret() -> None:
    tops = [split(bytes(32), 2, 2, os.urandom)[0][31] for _ in range(2000)]
    assert 56 < np.mean(tops) < 72  # uniform below 2^255: mean 63.5, five standard deviations 4.1


@pytest.mark.parametrize(
    ("threshold", "secret"), [(0, bytes(32)), (4, bytes(32)), (2, b"\xff" * 32), (2, b"")]
)
def test_impossible_sharings_are_refused(threshold: int, secret: bytes) -> None:
    with pytest.raises(ValueError, match=r"threshold|secret"):
        split(secret, 3, threshold, os.urandom)


@given(st.binary(max_size=80), st.integers(0, 95), st.integers(1, 255))
def test_a_sealed_share_opens_unchanged_or_not_at_all(plain: bytes, place: int, change: int) -> None:
    key, sealed = bytes(32), seal(bytes(32), plain, b"about")
    assert unseal(key, sealed, b"about") == plain
    spoiled = bytearray(sealed)
    spoiled[place % len(sealed)] ^= change
    for other, text, about in (
        (key, bytes(spoiled), b"about"),
        (key, sealed, b""),
        (b"k" * 32, sealed, b"about"),
    ):
        with pytest.raises(SecureSumError, match="does not open"):
            unseal(other, text, about)
    with pytest.raises(SecureSumError, match="does not open"):
        unseal(key, b"", b"about")


def test_drawn_secrets_and_keys_are_below_the_modulus() -> None:
    high = iter([b"\xff" * 32, bytes(31) + b"\x01"])
    assert draw_secret(lambda size: next(high)) == bytes(31) + b"\x01"
    high = iter([b"\xff" * 32, bytes(32)])
    assert draw_key(lambda size: next(high)) == bytes(31) + b"\x40"
