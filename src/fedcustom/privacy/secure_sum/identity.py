"""Who signs in a secure sum: an interface for a deployment's certificates, and Ed25519 keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from ...core.errors import SecureSumError


class Signer(Protocol):
    """A site's own lasting key."""

    @property
    def credential(self) -> bytes:
        """What the others check its signatures by: a public key, or a certificate."""

    def sign(self, message: bytes) -> bytes:
        """A signature."""


class Verifier(Protocol):
    """What a party knows of the others' lasting keys."""

    def verify(self, name: str, credential: bytes, message: bytes, signature: bytes) -> None:
        """Refuse a signature that the site of that name has not made.

        Args:
            name: The site.
            credential: What the site brought along, which by itself proves nothing.
            message: What is signed.
            signature: The signature.

        Raises:
            SecureSumError: names the site, and says what is wrong.
        """


class Ed25519Signer:
    """A signer with an Ed25519 key; without ``private`` (32 bytes) a new one."""

    def __init__(self, private: bytes | None = None) -> None:
        new = Ed25519PrivateKey
        self.key = new.generate() if private is None else new.from_private_bytes(private)

    @property
    def credential(self) -> bytes:
        """The public key, 32 bytes."""
        return self.key.public_key().public_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        """An Ed25519 signature, 64 bytes."""
        return self.key.sign(message)


class Ed25519Verifier:
    """Public keys of sites that are known beforehand, by name."""

    def __init__(self, known: Mapping[str, bytes]) -> None:
        self.known = dict(known)

    def verify(self, name: str, credential: bytes, message: bytes, signature: bytes) -> None:
        """Refuse a signature that is not by the key that is known of the site."""
        if name not in self.known or self.known[name] != credential:
            raise SecureSumError(f"{name}: signs with a key that is not known to be its own")
        try:
            Ed25519PublicKey.from_public_bytes(credential).verify(signature, message)
        except (InvalidSignature, ValueError):
            raise SecureSumError(f"{name}: its signature is forged") from None
