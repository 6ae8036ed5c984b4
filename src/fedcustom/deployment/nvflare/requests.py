"""A site's own key: made at the site together with a signing request, and installed when it is signed.

The private key is in the site's kit and nowhere else: in ``request/`` until its certificate is there, then in
``startup/``. What travels is ``NAME.request.zip`` (the public key) and ``NAME.signed.zip`` (certificates).
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from ...core.errors import DeploymentError
from .certificates import (
    PROJECT,
    Certificate,
    colons,
    key_of,
    parse_certificate,
    read_certificate,
    read_zip,
    request_description,
    restrict_permissions,
    run_tool,
    same_digest,
    zip_member,
)
from .kits import check_site_name, configure_site, site_name

PENDING = "request"
"""Folder in the kit with the request under way, and its key."""

SIGNED = "request.signed"
"""Folder in the kit with the request that was signed last; a renewal for the same key needs it."""


def make_request(kit: Path, name: str, *, force: bool = False) -> tuple[Path, str]:
    """Make a key and a signing request in a kit's folder. A kit that is in use goes on with its old key.

    Args:
        kit: The site's folder; made if it is not there.
        name: The site's name, as in the federation.
        force: Replace a request that is under way; a file signed for it can then not be installed.

    Returns:
        The file for the federation's administrator, and the SHA-256 of the public key.

    Raises:
        DeploymentError: no site's name, a kit of another site, or a request that is under way.
    """
    check_site_name(name)
    if (kit / "startup").exists() and site_name(kit) != name:
        raise DeploymentError(f"{kit}: is the kit of {site_name(kit)}, not of {name}; name another --kit")
    pending = kit / PENDING
    if pending.exists() and not force:
        raise DeploymentError(
            f"{pending}: holds a request already; send {name}.request.zip from there, or make another key "
            "with --force"
        )
    kit.mkdir(parents=True, exist_ok=True, mode=0o700)
    kit.chmod(0o700)
    work = Path(tempfile.mkdtemp(prefix=".request-", dir=kit)).absolute()
    try:
        (work / "participant.yaml").write_text(request_description(name))
        run_tool("cert", "request", "-p", "participant.yaml", "--out", "made", work=work)
        key = key_of((work / "made" / f"{name}.key").read_bytes(), f"{name}.key")
        restrict_permissions(work)
        shutil.rmtree(pending, ignore_errors=True)
        (work / "made").rename(pending)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return pending / f"{name}.request.zip", key


def install(kit: Path, signed: Path, *, fingerprint: str = "") -> Certificate:
    """Put a signed certificate into the kit: a new kit is completed, one in use gets the new certificate (and
    key) the next time the site starts or connects.

    Args:
        kit: The site's folder, in which :func:`make_request` made the key.
        signed: ``NAME.signed.zip`` from the federation's administrator.
        fingerprint: SHA-256 of the authority's certificate as the administrator says it; compared if given.

    Raises:
        DeploymentError: the file is no signed certificate, is another site's or for another key, comes from
            an authority other than the given or the present one; the engine's own error.
    """
    content, described = read_zip(signed, "signed")
    name = str(described.get("name"))
    check_site_name(name)
    try:
        certificate = parse_certificate(zip_member(content, f"{name}.crt"), signed)
        authority = parse_certificate(zip_member(content, "rootCA.pem"), signed)
    except DeploymentError:
        raise
    except Exception as error:  # a stranger's file
        raise DeploymentError(f"{signed}: is damaged: {error}") from None
    if certificate.name != name:
        raise DeploymentError(f"{signed}: its certificate is of {certificate.name!r}, not of {name}")
    if fingerprint and not same_digest(fingerprint, authority.fingerprint):
        raise DeploymentError(
            f"{signed}: its authority has the fingerprint {colons(authority.fingerprint)}, not the one "
            "given; nothing was installed"
        )
    startup = kit / "startup"
    if startup.exists():
        if site_name(kit) != name:
            raise DeploymentError(f"{kit}: is the kit of {site_name(kit)}; {signed} is for {name}")
        present = read_certificate(startup / "rootCA.pem").fingerprint
        if present != authority.fingerprint and not fingerprint:
            raise DeploymentError(
                f"{signed}: comes from another authority than the kit's; if that is meant, give "
                "--fingerprint as its administrator says it"
            )
    source, key = _matching_request(kit, name, certificate, signed)
    work = Path(tempfile.mkdtemp(prefix=".install-", dir=kit)).absolute()
    try:
        made = work / "request"
        shutil.copytree(source, made)
        (made / f"{name}.key").unlink(missing_ok=True)
        (made / f"{name}.key").touch(mode=0o600)
        (made / f"{name}.key").write_bytes(key)
        (work / f"{name}.signed.zip").write_bytes(content)
        run_tool(
            *("package", f"{name}.signed.zip", "--request-dir", "request", "-w", "kits"),
            *("--fingerprint", colons(authority.fingerprint)), work=work,
        )  # fmt: skip
        built = work / "kits" / PROJECT / "prod_00" / name
        if not (built / "startup").is_dir():
            raise DeploymentError(f"{signed}: the engine made no kit of it")
        configure_site(built)
        restrict_permissions(built)
        if startup.exists():
            # The certificate last: what was interrupted is completed by installing again.
            for file in sorted((built / "startup").iterdir(), key=lambda path: path.suffix == ".crt"):
                file.replace(startup / file.name)
        else:
            for path in sorted(built.iterdir(), key=lambda path: path.name == "startup"):
                shutil.rmtree(kit / path.name, ignore_errors=True)
                path.rename(kit / path.name)
        if source.name == PENDING:
            (source / f"{name}.key").unlink()
            shutil.rmtree(kit / SIGNED, ignore_errors=True)
            source.rename(kit / SIGNED)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    restrict_permissions(kit)
    return certificate


def _matching_request(kit: Path, name: str, certificate: Certificate, signed: Path) -> tuple[Path, bytes]:
    """The request that was signed, and its private key."""
    places = [(kit / PENDING, kit / PENDING / f"{name}.key"), (kit / SIGNED, kit / "startup" / "client.key")]
    for folder, file in places:
        if folder.is_dir() and file.is_file():
            key = file.read_bytes()
            if key_of(key, file) == certificate.key:
                return folder, key
    raise DeploymentError(
        f"{signed}: is for a key that {kit} does not hold; name the folder in which fedcustom site request "
        "made it"
    )
