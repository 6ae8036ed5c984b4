"""Authority of a federation: signs sites' requests, revokes and renews certificates, registers all of them.

The authority's own key is in ``authority/cert.json`` and nowhere else; no participant's private key is there.
``authority/certificates.json`` registers every certificate that was ever issued. From it follows the access
list in the server's kit, which a running server obeys within a second (:mod:`.server_train`).
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...core.errors import DeploymentError
from ...core.files import held, read_json, write_json
from ..settings import FederationSettings, load_federation, save_federation
from .access_list import FILE
from .certificates import (
    PROJECT,
    VALID_DAYS,
    Certificate,
    colons,
    parse_certificate,
    read_certificate,
    read_zip,
    request_description,
    restrict_permissions,
    run_tool,
    same_digest,
    zip_member,
)
from .jobs import ADMINISTRATOR
from .kits import check_site_name

REGISTER = "certificates.json"


@dataclass(frozen=True)
class Entry:
    """A certificate in the register; ``revoked`` is the day of its revocation, or empty."""

    name: str
    serial: str
    fingerprint: str
    key: str
    until: str
    revoked: str = ""

    @property
    def certificate(self) -> Certificate:
        """The certificate that was issued."""
        until = datetime.fromisoformat(self.until)
        return Certificate(self.name, self.serial, self.fingerprint, self.key, until)


def register_kits(folder: Path) -> None:
    """Register the certificates of freshly provisioned kits, and remove every private key but the authority's
    own from ``authority/``.
    """
    with _changing(folder):
        _scrub(folder)
        entries = [_entry(read_certificate(file)) for file in _own_certificates(folder)]
        _save(folder, [*_register(folder), *entries])
        restrict_permissions(folder / "authority", folder / "server", folder / "admin", folder / "sites")


def register(folder: Path) -> list[Entry]:
    """All certificates that were ever issued, in the order of their issue.

    Raises:
        DeploymentError: the folder holds no federation, or one without a register.
    """
    load_federation(folder)
    if not (folder / "authority" / REGISTER).exists():
        raise DeploymentError(
            f"{folder}: has no register of certificates (authority/{REGISTER}): it was made by an earlier "
            "version, or authority/ is elsewhere. Make the federation again with fedcustom deploy init"
        )
    return _register(folder)


def authority_certificate(folder: Path) -> Certificate:
    """The authority's own certificate, which every kit trusts."""
    return read_certificate(folder / "server" / "startup" / "rootCA.pem")


def current(entries: Sequence[Entry], name: str) -> Certificate | None:
    """The certificate of a participant that is accepted for longest, if any is."""
    usable = [entry.certificate for entry in reversed(entries) if entry.name == name and not entry.revoked]
    return max(usable, key=lambda certificate: certificate.until, default=None)


def sign(
    folder: Path,
    request: Path,
    out: Path,
    *,
    fingerprint: str = "",
    add: bool = False,
    days: int = VALID_DAYS,
) -> Certificate:
    """Sign a site's request and let the server accept the certificate, at once if it is running.

    Earlier certificates of the site stay accepted until they expire, so that it need not stop.

    Args:
        folder: The federation's.
        request: ``NAME.request.zip`` from the site; it holds a public key only.
        out: Where the signed file for the site is written.
        fingerprint: SHA-256 of the site's public key as its administrator says it; compared if given.
        add: Make the site a member of the federation if it is none.
        days: Validity in days.

    Raises:
        DeploymentError: no request, not a site's, of a name that is no member, with a fingerprint other than
            the given one, or for a key that was revoked or belongs to another participant.
    """
    with _changing(folder):
        entries, settings = register(folder), load_federation(folder)
        content, described = read_zip(request, "request")
        name, key = str(described.get("name")), str(described.get("public_key_sha256")).lower()
        if described.get("kind") != "site" or described.get("cert_type") != "client":
            raise DeploymentError(
                f"{request}: asks for the role of {str(described.get('cert_type'))[:40]!r}; "
                "only sites are signed"
            )
        check_site_name(name, settings.server)
        if name not in settings.sites and not add:
            raise DeploymentError(
                f"{request}: {name!r} is no member; members: {', '.join(settings.sites)}. "
                "To make it one, give --add"
            )
        if fingerprint and not same_digest(fingerprint, key):
            raise DeploymentError(
                f"{request}: its key has the fingerprint {colons(key)}, not the one given; nothing was signed"
            )
        for entry in entries:
            if entry.key == key and (entry.revoked or entry.name != name):
                reason = "was revoked" if entry.revoked else f"belongs to {entry.name}"
                raise DeploymentError(
                    f"{request}: its key {reason}; the site has to make another: "
                    f"fedcustom site request {name} --force"
                )
        signed, certificate = _approve(folder, content, name, days)
        if certificate.key != key:
            raise DeploymentError(f"{request}: holds another key than it says; nothing was signed")
        if name not in settings.sites:
            save_federation(folder, settings.model_copy(update={"sites": [*settings.sites, name]}))
        _write_private(out, signed)
        _write_private(_stored_request(folder, name), content)  # for its renewal
        _save(folder, [*entries, _entry(certificate)])
        return certificate


def revoke(folder: Path, name: str) -> list[Certificate]:
    """Withdraw all of a site's certificates, for good: a running server closes its connections within a
    second, and no other connection is accepted with them. Its keys are never signed again.

    Returns:
        The certificates that were accepted until now.

    Raises:
        DeploymentError: the site has no certificate that is accepted.
    """
    with _changing(folder):
        entries = register(folder)
        settings = load_federation(folder)
        if name in (settings.server, ADMINISTRATOR):
            raise DeploymentError(
                f"{name}: is no site; its certificate is replaced by fedcustom deploy renew"
            )
        found = [entry for entry in entries if entry.name == name and not entry.revoked]
        if not found:
            sites = {entry.name for entry in entries if not entry.revoked} - {settings.server, ADMINISTRATOR}
            raise DeploymentError(
                f"{name}: has no certificate that is accepted; sites that have one: "
                f"{', '.join(sorted(sites)) or 'none'}"
            )
        today = f"{datetime.now(UTC):%Y-%m-%d}"
        gone = {entry.fingerprint for entry in found}
        _save(
            folder,
            [Entry(**asdict(e) | {"revoked": today}) if e.fingerprint in gone else e for e in entries],
        )
        _stored_request(folder, name).unlink(missing_ok=True)
        return [entry.certificate for entry in found]


@dataclass(frozen=True)
class Renewal:
    """A renewed certificate, and the file that has to be sent to its site (None: its kit is here)."""

    certificate: Certificate
    file: Path | None


def renew(
    folder: Path, names: Sequence[str] = (), *, days: int = VALID_DAYS, running: bool = False
) -> list[Renewal]:
    """Renew the certificates that expire within 30 days, or those of the named participants.

    The server, the administrator and the sites of a local try-out, whose kits are here, get a new key. A site
    that holds its own key gets a certificate for the same key; a signed file is written for it.

    Raises:
        DeploymentError: an unknown name, a site whose request is not kept, or the server or the administrator
            while a run is under way (``running``), whose processes have to agree on their keys.
    """
    with _changing(folder):
        entries, settings = register(folder), load_federation(folder)
        kits = {settings.server: folder / "server", ADMINISTRATOR: folder / "admin"}
        kits |= {path.name: path for path in sorted((folder / "sites").iterdir())}
        known = [name for name in [*kits, *settings.sites] if current(entries, name) is not None]
        for name in names:
            if name not in known:
                raise DeploymentError(f"{name}: has no certificate; those who have: {', '.join(known)}")
        done = []
        for name in dict.fromkeys(names or known):
            certificate = current(entries, name)
            assert certificate is not None
            if not names and not certificate.due():
                continue
            if running and name in (settings.server, ADMINISTRATOR):
                raise DeploymentError(
                    f"{name}: is renewed while no run is under way (fedcustom deploy stop); sites can be "
                    "renewed now by their names"
                )
            if name in kits:
                renewal = Renewal(_replace_key(folder, kits[name], name, settings, days), None)
            else:
                stored = _stored_request(folder, name)
                if not stored.exists():
                    raise DeploymentError(
                        f"{name}: its request is not kept here; the site makes another: "
                        f"fedcustom site request {name}"
                    )
                signed, certificate = _approve(folder, stored.read_bytes(), name, days)
                out = folder / f"{name}.signed.zip"
                _write_private(out, signed)
                renewal = Renewal(certificate, out)
            entries = [*entries, _entry(renewal.certificate)]
            _save(folder, entries)  # after each: one that is not registered would not be let in
            done.append(renewal)
        return done


# --- the register ---


@contextlib.contextmanager
def _changing(folder: Path) -> Iterator[None]:
    """Hold the register, so that two commands at one time do not lose each other's changes."""
    if not (folder / "authority").is_dir():
        raise DeploymentError(f"{folder}: has no authority/, whose key signs; this is done where it is kept")
    with held(folder / "authority" / "lock") as acquired:
        if not acquired:
            raise DeploymentError(f"{folder}: another command changes its certificates at this moment")
        for left in (folder / "authority").glob(".work-*"):  # by a command that was killed
            shutil.rmtree(left, ignore_errors=True)
        yield


def _register(folder: Path) -> list[Entry]:
    file = folder / "authority" / REGISTER
    if not file.exists():
        return []
    try:
        return [Entry(**entry) for entry in read_json(file)["certificates"]]
    except (KeyError, TypeError) as error:
        raise DeploymentError(f"{file}: is damaged: {error}") from None


def _save(folder: Path, entries: Sequence[Entry]) -> None:
    """Write the register, then the access list that follows from it."""
    file = folder / "authority" / REGISTER
    write_json(file, {"certificates": [asdict(entry) for entry in entries]})
    file.chmod(0o600)
    accepted: dict[str, list[str]] = {}
    for entry in entries:
        if not entry.revoked:
            accepted.setdefault(entry.name, []).append(entry.fingerprint)
    write_json(folder / "server" / FILE, {name: sorted(accepted[name]) for name in sorted(accepted)})
    (folder / "server" / FILE).chmod(0o600)


def _entry(certificate: Certificate) -> Entry:
    return Entry(
        certificate.name, certificate.serial, certificate.fingerprint, certificate.key,
        certificate.until.isoformat(),
    )  # fmt: skip


def _own_certificates(folder: Path) -> list[Path]:
    """The certificates of the kits that are in the federation's folder."""
    sites = sorted((folder / "sites").glob("*/startup/client.crt"))
    return [folder / "server" / "startup" / "server.crt", folder / "admin" / "startup" / "client.crt", *sites]


def _scrub(folder: Path) -> None:
    """Keep the authority's certificate and key alone: the engine's state holds every participant's key."""
    file = folder / "authority" / "cert.json"
    state = read_json(file)
    write_json(file, {key: state[key] for key in ("root_cert", "root_pri_key")})
    file.chmod(0o600)


# --- signing ---


def _approve(folder: Path, request: bytes, name: str, days: int) -> tuple[bytes, Certificate]:
    """Have the engine check and sign a request; the signed file's content, and the certificate in it."""
    settings = load_federation(folder)
    with _workplace(folder) as work:
        (work / "request.zip").write_bytes(request)
        _write_ca(folder, work, settings)
        run_tool(
            *("cert", "approve", "request.zip", "-c", "ca", "--profile", "ca/profile.yaml"),
            *("--out", "signed.zip", "--valid-days", days), work=work,
        )  # fmt: skip
        signed = (work / "signed.zip").read_bytes()
    certificate = parse_certificate(zip_member(signed, f"{name}.crt"), f"{name}.crt")
    return signed, certificate


def _replace_key(folder: Path, kit: Path, name: str, settings: FederationSettings, days: int) -> Certificate:
    """Put a new key and its certificate into a kit that is here."""
    kind = {settings.server: "server", ADMINISTRATOR: "admin"}.get(name, "client")
    base = "server" if kind == "server" else "client"
    with _workplace(folder) as work:
        (work / "participant.yaml").write_text(request_description(name, kind))
        run_tool("cert", "request", "-p", "participant.yaml", "--out", "made", work=work)
        signed, certificate = _approve(
            folder, (work / "made" / f"{name}.request.zip").read_bytes(), name, days
        )
        # Both lie beside the old ones before either takes its place.
        for suffix, content in (
            ("key", (work / "made" / f"{name}.key").read_bytes()),
            ("crt", zip_member(signed, f"{name}.crt")),
        ):
            _write_private(kit / "startup" / f".{base}.{suffix}.new", content)
    for suffix in ("key", "crt"):
        (kit / "startup" / f".{base}.{suffix}.new").replace(kit / "startup" / f"{base}.{suffix}")
    return certificate


@contextlib.contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    """A folder inside ``authority/`` for what the engine's tool reads and writes; removed afterwards."""
    work = Path(tempfile.mkdtemp(prefix=".work-", dir=folder / "authority"))
    try:
        yield work.absolute()
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_ca(folder: Path, work: Path, settings: FederationSettings) -> None:
    """The authority as the engine's tool wants it."""
    state: dict[str, Any] = read_json(folder / "authority" / "cert.json")
    (work / "ca").mkdir(mode=0o700)
    _write_private(work / "ca" / "rootCA.key", state["root_pri_key"].encode())
    _write_private(work / "ca" / "rootCA.pem", state["root_cert"].encode())
    (work / "ca" / "ca.json").write_text(json.dumps({"project": PROJECT, "provision_version": "00"}))
    server = {"host": settings.server, "fed_learn_port": settings.port, "admin_port": settings.port}
    profile = {"name": PROJECT, "scheme": "tcp", "connection_security": "mtls", "server": server}
    (work / "ca" / "profile.yaml").write_text(json.dumps(profile))


def _stored_request(folder: Path, name: str) -> Path:
    return folder / "authority" / "requests" / f"{name}.request.zip"


def _write_private(path: Path, content: bytes) -> None:
    """Write a file that nobody but its owner can read at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.unlink(missing_ok=True)
    path.touch(mode=0o600, exist_ok=False)
    path.write_bytes(content)
