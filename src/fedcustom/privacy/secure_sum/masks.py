"""Masks: X25519 key agreement, HKDF-SHA256 seeds, AES-256-CTR streams that are added to a vector."""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ...core.errors import SecureSumError
from .integers import Numbers
from .shares import PRIME, SIZE, Random

CHUNK_BYTES = 2**18
"""Bytes of a mask that are in memory at a time."""


def draw_key(random: Random) -> bytes:
    """A private X25519 key (RFC 7748), clamped, below the shares' modulus so that it can be shared."""
    while True:
        key = bytearray(random(SIZE))
        key[0] &= 248
        key[31] = key[31] & 127 | 64
        if int.from_bytes(key, "little") < PRIME:
            return bytes(key)


def public_key(private: bytes) -> bytes:
    """The public half of a private key, 32 bytes."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agreed_seed(private: bytes, public: bytes, purpose: bytes) -> bytes:
    """32 bytes that two owners of keys have in common for one purpose: HKDF-SHA256 of what X25519 gives.

    Raises:
        SecureSumError: the public key is none, or of small order.
    """
    try:
        secret = X25519PrivateKey.from_private_bytes(private).exchange(
            X25519PublicKey.from_public_bytes(public)
        )
    except ValueError:
        raise SecureSumError("a public key of a secure sum is no X25519 key") from None
    return derived(secret, purpose)


def derived(secret: bytes, purpose: bytes) -> bytes:
    """32 bytes that follow from a secret for one purpose (HKDF-SHA256)."""
    return HKDF(SHA256(), SIZE, None, purpose).derive(secret)


def add_mask(numbers: Numbers, seed: bytes, *, subtract: bool = False) -> None:
    """Add the mask of a seed to a vector in place, or subtract it, modulo 2^32 or 2^64: the key stream of
    AES-256-CTR, as little-endian integers. A seed is for one mask.
    """
    stream = Cipher(AES256(seed), CTR(bytes(16))).encryptor()
    longest = min(CHUNK_BYTES, numbers.nbytes)
    step, zeros, room = CHUNK_BYTES // numbers.itemsize, bytes(longest), bytearray(longest + 15)
    kind = numbers.dtype.newbyteorder("<")
    change = np.subtract if subtract else np.add
    for start in range(0, len(numbers), step):
        part = numbers[start : start + step]
        length = len(part) * numbers.itemsize
        stream.update_into(memoryview(zeros)[:length], room)
        change(part, np.frombuffer(room, kind, len(part)), out=part)
