"""Certificates: what one says, when it has to be renewed, and the engine's tool that makes them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import NameOID

from ...core.errors import DeploymentError
from .access_list import fingerprint

PROJECT = "fedcustom"
"""Name of the federation in certificates and kits."""

WARNING_PERIOD = timedelta(days=30)
"""How long before its end a certificate is warned of, and renewed."""

VALID_DAYS = 360
"""Days that a certificate is valid by default."""

MAX_MEMBER_BYTES = 2**20


@dataclass(frozen=True)
class Certificate:
    """What a certificate says.

    Attributes:
        name: the participant (common name).
        serial: serial number in hexadecimal digits.
        fingerprint: SHA-256 of the certificate (DER).
        key: SHA-256 of the public key (``SubjectPublicKeyInfo``, DER).
        until: when it expires.
    """

    name: str
    serial: str
    fingerprint: str
    key: str
    until: datetime

    def expired(self, now: datetime | None = None) -> bool:
        """Whether it has expired."""
        return self.until <= (now or datetime.now(UTC))

    def due(self, now: datetime | None = None) -> bool:
        """Whether it expires within 30 days, or has expired."""
        return self.until - (now or datetime.now(UTC)) <= WARNING_PERIOD

    def state(self, now: datetime | None = None) -> str:
        """Its validity in words: until when, and how many days are left if they are few."""
        moment = now or datetime.now(UTC)
        day = f"{self.until:%Y-%m-%d}"
        if self.expired(moment):
            return f"expired on {day}"
        if self.due(moment):
            return f"expires on {day}, in {(self.until - moment).days} days"
        return f"valid until {day}"


def parse_certificate(pem: bytes, source: object) -> Certificate:
    """Read a certificate (PEM).

    Raises:
        DeploymentError: it is none; the message names ``source``.
    """
    try:
        found = x509.load_pem_x509_certificate(pem)
        name = str(found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
    except (ValueError, IndexError) as error:
        raise DeploymentError(f"{source}: is no certificate: {_first_line(str(error))}") from None
    return Certificate(
        name=name,
        serial=f"{found.serial_number:x}",
        fingerprint=fingerprint(found.public_bytes(Encoding.DER)),
        key=_key_digest(found.public_key()),
        until=found.not_valid_after_utc,
    )


def read_certificate(file: Path) -> Certificate:
    """Read a certificate's file.

    Raises:
        DeploymentError: there is none, or it holds no certificate.
    """
    try:
        return parse_certificate(file.read_bytes(), file)
    except OSError as error:
        raise DeploymentError(f"{file}: cannot be read: {error.strerror}") from None


def key_of(pem: bytes, source: object) -> str:
    """SHA-256 of the public half of a private key (PEM), as in :attr:`Certificate.key`.

    Raises:
        DeploymentError: it is no private key.
    """
    try:
        return _key_digest(load_pem_private_key(pem, None).public_key())
    except (ValueError, TypeError) as error:
        raise DeploymentError(f"{source}: is no private key: {_first_line(str(error))}") from None


def colons(digest: str) -> str:
    """A digest as people compare it: ``SHA256:AB:CD:...``."""
    digits = digest.upper()
    return "SHA256:" + ":".join(digits[place : place + 2] for place in range(0, len(digits), 2))


def same_digest(text: str, digest: str) -> bool:
    """Whether a digest as somebody typed it (any case, colons, ``SHA256:`` in front) is this one."""
    typed = text.strip().lower().removeprefix("sha256").lstrip(":= ").replace(":", "").replace(" ", "")
    return typed == digest.lower()


def run_tool(*arguments: object, work: Path) -> None:
    """Run a command of the engine (``nvflare cert ...``, ``nvflare package ...``).

    Its records, which it keeps in the user's home by default, go to ``work`` and are not kept.

    Raises:
        DeploymentError: the engine's own error.
    """
    with tempfile.TemporaryDirectory(dir=work) as home:
        result = subprocess.run(
            [sys.executable, "-m", "nvflare.cli", *map(str, arguments)],
            cwd=work, env=os.environ | {"HOME": home}, umask=0o077,
            capture_output=True, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    if result.returncode:
        raise DeploymentError(
            f"{' '.join(map(str, arguments[:2]))}: {_reason(result.stderr + result.stdout)}"
        )


def read_zip(file: Path, kind: str) -> tuple[bytes, dict[str, Any]]:
    """The content of a request or a signed certificate, and its description, unchecked.

    Args:
        file: A zip file of the engine.
        kind: ``request`` or ``signed``.

    Raises:
        DeploymentError: the file is something else.
    """
    try:
        if file.stat().st_size > 8 * MAX_MEMBER_BYTES:
            raise ValueError("too large")
        content = file.read_bytes()
        described = json.loads(zip_member(content, f"{kind}.json"))
        if not isinstance(described, dict):
            raise ValueError(f"{kind}.json is no object")
    except Exception as error:  # a stranger's file: zip and JSON readers raise a dozen kinds
        wanted = (
            "signing request (NAME.request.zip)" if kind == "request" else "signed file (NAME.signed.zip)"
        )
        raise DeploymentError(f"{file}: is no {wanted}: {_first_line(str(error))}") from None
    return content, described


def zip_member(content: bytes, name: str) -> bytes:
    """One file in a zip file's content.

    Raises:
        KeyError, ValueError: it is not there, or too large; :mod:`zipfile`'s errors: it is damaged.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive, archive.open(name) as member:
        found = member.read(MAX_MEMBER_BYTES + 1)
    if len(found) > MAX_MEMBER_BYTES:
        raise ValueError(f"{name} is too large")
    return found


def restrict_permissions(*folders: Path) -> None:
    """Let only the owner read what a folder holds: folders and scripts 0700, other files 0600.

    Links are left alone: what they lead to may be another's.
    """
    for folder in folders:
        folder.chmod(0o700)
        for path in folder.rglob("*"):
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                continue
            with contextlib.suppress(FileNotFoundError):  # a running site's files come and go
                path.chmod(0o700 if path.is_dir() or path.suffix == ".sh" else 0o600)


def request_description(name: str, kind: str = "client") -> str:
    """The engine's description of a participant that asks for a certificate (JSON is YAML)."""
    participant: dict[str, Any] = {"name": name, "type": kind, "org": "federation"}
    if kind == "admin":
        participant["role"] = "lead"
    return json.dumps({"name": PROJECT, "participants": [participant]})


def _key_digest(key: Any) -> str:
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _reason(output: str) -> str:
    lines: Sequence[str] = [line for line in output.splitlines() if line.strip()]
    marks = [line for line in lines if "Code:" in line]
    if marks and (place := lines.index(marks[0])) >= 2:
        return lines[place - 2].strip()
    return lines[-1].strip() if lines else "no reason given"


def _first_line(text: str) -> str:
    return (text.splitlines() or ["unreadable"])[0]
