"""Shamir's secret sharing over the integers modulo 2^255 - 19, and the sealing of shares for one receiver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ...core.errors import SecureSumError

PRIME = 2**255 - 19
"""Modulus of secrets and shares."""

SIZE = 32
"""Bytes of a secret, and of a share."""

NONCE = bytes(12)
"""AES-GCM's nonce: every key seals one message."""

Random = Callable[[int], bytes]
"""So many random bytes, as :func:`os.urandom` gives."""


def draw_secret(random: Random) -> bytes:
    """A uniform secret below :data:`PRIME`, 32 bytes."""
    while True:
        number = int.from_bytes(random(SIZE), "little") & (2**255 - 1)
        if number < PRIME:
            return number.to_bytes(SIZE, "little")


def split(secret: bytes, count: int, threshold: int, random: Random) -> list[bytes]:
    """Shares of a secret for ``count`` receivers, of which any ``threshold`` give it and fewer say nothing
    (Shamir 1979): the values at 1, 2, ..., ``count`` of a random polynomial of degree ``threshold - 1`` whose
    value at 0 is the secret.

    Raises:
        ValueError: the secret is not below :data:`PRIME`, or the threshold is not from 1 to ``count``.
    """
    if not 1 <= threshold <= count:
        raise ValueError(f"threshold {threshold}: must be from 1 to {count}")
    value = int.from_bytes(secret, "little")
    if len(secret) != SIZE or value >= PRIME:
        raise ValueError("a secret must be 32 bytes below 2^255 - 19")
    coefficients = [int.from_bytes(draw_secret(random), "little") for _ in range(threshold - 1)] + [value]
    found = []
    for x in range(1, count + 1):
        y = 0
        for coefficient in coefficients:  # Horner's rule, the highest power first
            y = (y * x + coefficient) % PRIME
        found.append(y.to_bytes(SIZE, "little"))
    return found


@lru_cache(maxsize=256)
def coefficients_at_zero(places: tuple[int, ...]) -> list[int]:
    """Lagrange's coefficients of the value at 0, for values at these places (1 or more, all different)."""
    found = []
    for own in places:
        above = below = 1
        for other in places:
            if other != own:
                above, below = above * other % PRIME, below * (other - own) % PRIME
        found.append(above * pow(below, -1, PRIME) % PRIME)
    return found


def join(coefficients: Sequence[int], shares: Sequence[bytes]) -> bytes:
    """The secret of shares at the places that the coefficients are for (:func:`coefficients_at_zero`)."""
    total = 0
    for coefficient, share in zip(coefficients, shares, strict=True):
        total += coefficient * int.from_bytes(share, "little")
    return (total % PRIME).to_bytes(SIZE, "little")


def seal(key: bytes, plain: bytes, about: bytes) -> bytes:
    """A message that only a holder of the key can read or make (AES-256-GCM). ``about`` is not in it, and
    must be the same when it is opened. A key is for one message.
    """
    return AESGCM(key).encrypt(NONCE, plain, about)


def unseal(key: bytes, sealed: bytes, about: bytes) -> bytes:
    """The inverse of :func:`seal`.

    Raises:
        SecureSumError: it was sealed with another key, or for another purpose, or was changed.
    """
    try:
        return AESGCM(key).decrypt(NONCE, sealed, about)
    except (InvalidTag, ValueError):
        raise SecureSumError("a sealed share does not open") from None
