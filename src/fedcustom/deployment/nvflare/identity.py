"""Signatures by the keys of kits, and their check by certificates of the federation's authority."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import NameOID

from ...core.errors import DeploymentError, SecureSumError
from .access_list import fingerprint
from .certificates import same_digest
from .kits import SITE_NAME

PADDING = padding.PSS(padding.MGF1(SHA256()), padding.PSS.DIGEST_LENGTH)


class KitSigner:
    """Signs with the private key of a site's kit; its ``credential`` is the kit's certificate (DER).

    Raises:
        DeploymentError: the kit has no key or certificate, or a key of another kind than RSA or EC.
    """

    def __init__(self, kit: Path) -> None:
        startup = kit / "startup"
        try:
            certificate = x509.load_pem_x509_certificate((startup / "client.crt").read_bytes())
            self.key: Any = load_pem_private_key((startup / "client.key").read_bytes(), None)
        except (OSError, ValueError, TypeError) as error:
            raise DeploymentError(f"{kit}: its key or certificate cannot be read: {error}") from None
        if not isinstance(self.key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
            raise DeploymentError(f"{kit}: its key is neither of RSA nor of an elliptic curve")
        self.credential = certificate.public_bytes(Encoding.DER)

    def sign(self, message: bytes) -> bytes:
        """A signature with SHA-256: RSA-PSS or ECDSA, as the key is."""
        if isinstance(self.key, rsa.RSAPrivateKey):
            return self.key.sign(message, PADDING, SHA256())
        signature: bytes = self.key.sign(message, ec.ECDSA(SHA256()))
        return signature


@dataclass
class CertificateVerifier:
    """Checks signatures by certificates that one authority has issued to sites.

    Args:
        authority: The authority's certificate.
        pinned: SHA-256 of the sites' certificates; with any, no other is believed.
        excluded: Names that are no site's: the server's.
    """

    authority: x509.Certificate
    pinned: Collection[str] = ()
    excluded: Collection[str] = ()

    @classmethod
    def of(cls, startup: Path, pinned: Collection[str] = ()) -> CertificateVerifier:
        """That of a kit's ``startup`` folder.

        Raises:
            DeploymentError: the kit has no authority's certificate.
        """
        try:
            authority = x509.load_pem_x509_certificate((startup / "rootCA.pem").read_bytes())
        except (OSError, ValueError) as error:
            raise DeploymentError(f"{startup}: the authority's certificate cannot be read: {error}") from None
        return cls(authority, pinned, _servers(startup))

    def verify(self, name: str, credential: bytes, message: bytes, signature: bytes) -> None:
        """Refuse a signature that was not made with the key of a certificate of that name (see
        :class:`~fedcustom.privacy.secure_sum.identity.Verifier`).
        """
        certificate = self._certificate(name, credential)
        key: Any = certificate.public_key()
        try:
            if isinstance(key, rsa.RSAPublicKey):
                key.verify(signature, message, PADDING, SHA256())
            elif isinstance(key, ec.EllipticCurvePublicKey):
                key.verify(signature, message, ec.ECDSA(SHA256()))
            else:
                raise SecureSumError(f"{name}: signs with a key of an unknown kind")
        except (InvalidSignature, ValueError):
            raise SecureSumError(f"{name}: its signature is forged") from None

    def _certificate(self, name: str, credential: bytes) -> x509.Certificate:
        try:
            certificate = x509.load_der_x509_certificate(credential)
            names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
            certificate.verify_directly_issued_by(self.authority)
        except Exception:  # whatever the reader makes of foreign bytes
            raise SecureSumError(f"{name}: its certificate is not the federation's") from None
        if [str(found.value) for found in names] != [name]:
            raise SecureSumError(f"{name}: signs with the certificate of another")
        if name in self.excluded or not SITE_NAME.fullmatch(name):
            raise SecureSumError(f"{name}: its certificate is no site's")
        now = datetime.now(UTC)
        if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            raise SecureSumError(f"{name}: its certificate is not valid now")
        digest = fingerprint(credential)
        if self.pinned and not any(same_digest(text, digest) for text in self.pinned):
            raise SecureSumError(f"{name}: its certificate is not among policy.peers")
        return certificate


def _servers(startup: Path) -> frozenset[str]:
    """Names of the federation's server, as a kit says them."""
    found = set[str]()
    for file in ("fed_client.json", "fed_server.json"):
        try:
            entries = json.loads((startup / file).read_text(encoding="utf-8"))["servers"]
            for entry in entries:
                found |= {str(entry[key]) for key in ("identity", "name") if key in entry}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return frozenset(found)
