"""Keys and certificates of a federation: more commands of ``deploy`` and ``site``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import out_console
from .deploy import Folder, deploy, site

Kit = Annotated[Path, typer.Argument(help="This site's start-up kit, a folder")]
Days = Annotated[int, typer.Option(min=1, max=3650, help="Days that the new certificate is valid")]
Names = Annotated[
    list[str] | None, typer.Argument(help="Sites (default: every certificate that expires within 30 days)")
]


@deploy.command()
def sign(
    request: Annotated[Path, typer.Argument(help="The site's file, NAME.request.zip")],
    folder: Folder = Path("federation"),
    out: Annotated[
        Path | None, typer.Option(help="The file for the site (default: NAME.signed.zip in the federation)")
    ] = None,
    fingerprint: Annotated[
        str, typer.Option(help="The key's fingerprint as the site says it; another key is not signed")
    ] = "",
    add: Annotated[bool, typer.Option("--add", help="Make the site a member if it is none yet")] = False,
    days: Days = 360,
) -> None:
    """Sign a site's request: the server lets the site in from now on, without a restart of anybody.

    Compare the fingerprint with the site's administrator over a channel that both trust (a call), before
    signing with --fingerprint or before sending the signed file. A request of a site that has a certificate
    gives it another one; the earlier one stays valid until it expires, or until 'fedcustom deploy revoke'.
    A new member takes part from the next run on; a site named by 'deploy init' may join a run under way.

    Example: fedcustom deploy sign north.request.zip --fingerprint AB:CD:...
    """
    from ..deployment.nvflare.kits import require_nvflare

    require_nvflare()
    from ..deployment.nvflare import authority
    from ..deployment.nvflare.certificates import colons, read_zip
    from ..deployment.settings import load_federation

    members = load_federation(folder).sites
    name = str(read_zip(request, "request")[1].get("name"))
    place = out or folder / f"{Path(name).name}.signed.zip"
    certificate = authority.sign(folder, request, place, fingerprint=fingerprint, add=add, days=days)
    _say(f"{certificate.name}: key {colons(certificate.key)}")
    _say(f"certificate {certificate.serial}, {certificate.state()}; the server lets it in")
    if certificate.name not in members:
        _say(f"{certificate.name} is a member now, and takes part from the next run on")
    _say(f"send back: {place}")
    _say(f"authority {colons(authority.authority_certificate(folder).fingerprint)}")
    _say(f"The site runs: fedcustom site install {certificate.name} {place.name}")


@deploy.command()
def revoke(
    name: Annotated[str, typer.Argument(metavar="SITE", help="The site that is not let in any more")],
    folder: Folder = Path("federation"),
) -> None:
    """Withdraw a site's certificates, for good: its connections are closed within a second or two.

    A run under way goes on with the other sites, and no new connection is accepted. The same key is never
    signed again; to return, the site makes another (fedcustom site request SITE --force). The name stays in
    federation.toml: remove it there to leave the site out of the next runs' cohorts too.

    Example: fedcustom deploy revoke north
    """
    from ..deployment import run as deployed
    from ..deployment.nvflare.kits import require_nvflare

    require_nvflare()
    from ..deployment.nvflare import authority

    for certificate in authority.revoke(folder, name):
        _say(f"{name}: certificate {certificate.serial} revoked")
    if deployed.running(folder) is not None:
        _say("the run under way closes its connections and goes on without it")


@deploy.command()
def renew(names: Names = None, folder: Folder = Path("federation"), days: Days = 360) -> None:
    """Renew certificates before they expire; 'fedcustom deploy check' lists them.

    The server and the administrator get a new key and certificate, while no run is under way. For a site a
    signed file is written, for the key that the site has: it installs the file with 'fedcustom site install'
    while it works, and uses the new certificate from its next start on.

    Example: fedcustom deploy renew
    """
    from ..deployment import run as deployed
    from ..deployment.nvflare.kits import require_nvflare

    require_nvflare()
    from ..deployment.nvflare import authority

    running = deployed.running(folder) is not None
    done = authority.renew(folder, names or [], days=days, running=running)
    for renewal in done:
        _say(f"{renewal.certificate.name}: {renewal.certificate.state()}")
        if renewal.file is not None:
            _say(
                f"send it: {renewal.file}; the site runs: fedcustom site install {renewal.certificate.name} "
                f"{renewal.file.name}"
            )
    if not done:
        _say("no certificate expires within 30 days; name one to renew it all the same")


@deploy.command("check")
def check_federation(folder: Folder = Path("federation")) -> None:
    """List all certificates with the day on which they expire, and say what has to be renewed.

    Example: fedcustom deploy check
    """
    from ..deployment.nvflare.kits import require_nvflare

    require_nvflare()
    from ..deployment.membership import check_certificates
    from ..deployment.nvflare import authority
    from ..deployment.nvflare.certificates import colons
    from ..deployment.settings import load_federation

    entries, settings = authority.register(folder), load_federation(folder)
    root = authority.authority_certificate(folder)
    _say(f"authority: {root.state()}; {colons(root.fingerprint)}")
    for entry in entries:
        state = f"revoked on {entry.revoked}" if entry.revoked else entry.certificate.state()
        _say(f"{entry.name}: certificate {entry.serial}, {state}")
    for name in settings.sites:
        if authority.current(entries, name) is None:
            _say(f"{name}: no certificate; the site runs: fedcustom site request {name}")
    check_certificates(folder, lambda text: _say(f"warning: {text}"))


@site.command("request")
def make_request(
    name: Annotated[str, typer.Argument(help="This site's name in the federation")],
    kit: Annotated[
        Path | None, typer.Option(help="The folder that becomes this site's kit (default: the name)")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Make another key although a request is under way")
    ] = False,
) -> None:
    """Make this site's own key, and the request that the federation's administrator signs.

    The private key stays in the kit, readable by its owner only. NAME.request.zip holds the public key; it
    may travel by any way, but tell the administrator the fingerprint over a channel that both trust (a call).
    For a site that is at work this prepares a change of its key.

    Example: fedcustom site request north
    """
    from ..deployment.nvflare.kits import require_nvflare

    require_nvflare()
    from ..deployment.nvflare import requests
    from ..deployment.nvflare.certificates import colons

    file, key = requests.make_request(kit or Path(name), name, force=force)
    _say(f"send to the federation's administrator: {file}")
    _say(f"and tell, over a channel that both trust: {colons(key)}")
    _say(f"then: fedcustom site install {kit or name} {name}.signed.zip")


@site.command()
def install(
    kit: Kit,
    signed: Annotated[Path, typer.Argument(help="The administrator's file, NAME.signed.zip")],
    fingerprint: Annotated[
        str,
        typer.Option(help="The authority's fingerprint as its administrator says it; no other is trusted"),
    ] = "",
) -> None:
    """Complete this site's kit with the signed certificate, or renew the certificate of a kit in use.

    Example: fedcustom site install north north.signed.zip
    """
    from ..deployment.nvflare.kits import require_nvflare

    require_nvflare()
    from ..deployment.nvflare import requests
    from ..deployment.nvflare.certificates import colons, read_certificate

    certificate = requests.install(kit, signed, fingerprint=fingerprint)
    _say(f"{kit}: certificate of {certificate.name}, {certificate.state()}")
    authority = read_certificate(kit / "startup" / "rootCA.pem")
    asked = "" if fingerprint else "; compare it with what the administrator says"
    _say(f"authority {colons(authority.fingerprint)}{asked}")
    _say(f"then: fedcustom site start {kit} --data site.toml")


def _say(text: str) -> None:
    out_console.print(text, soft_wrap=True)


__all__ = ["deploy", "site"]  # with these commands
