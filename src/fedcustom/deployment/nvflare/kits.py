"""Start-up kits: certificates and configuration for the server, the sites and the administrator."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...core.errors import DeploymentError
from .jobs import ADMINISTRATOR, CONTROLLER, EXECUTOR

SITE_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,252}[A-Za-z0-9])?")

HEARTBEAT_TIMEOUT = 20.0
"""Seconds without a heartbeat after which the server takes a site for disconnected."""

HEARTBEAT_INTERVAL = 4
"""Seconds between a site's heartbeats."""


AUTHORITY_DAYS = 3650
"""Days that the authority's own certificate is valid; no other outlives it."""


def require_nvflare() -> None:
    """Raise :class:`DeploymentError` with the remedy where the engine is not installed."""
    from importlib.util import find_spec

    if find_spec("nvflare") is None:
        raise DeploymentError("a deployed run needs nvflare: pip install 'fedcustom[deploy]'")


def provision(folder: Path, server: str, port: int, sites: Sequence[str], *, site_kits: bool = True) -> None:
    """Make the kits of a federation: ``server/``, ``admin/`` and, with ``site_kits``, ``sites/<name>/``, each
    with its own key and certificate (360 days), and ``authority/`` with the key that signed them (ten years).

    Every connection between them is mutual TLS. Kits of sites are for trying a federation out on one machine:
    whoever makes a kit knows its key. Elsewhere a site makes its own key (:mod:`.requests`) and the authority
    signs it (:mod:`.authority`). No private key is in two places; files are readable by their owner alone.

    Raises:
        DeploymentError: a name that cannot be one, or two that are the same; the engine's own error.
    """
    require_nvflare()
    _check_names(server, sites)
    from .authority import register_kits

    made, folder_names = (sites if site_kits else []), ("server", "admin", "authority")
    for name in folder_names:
        if (folder / name).exists():
            raise DeploymentError(f"{folder / name}: is there already; name another folder")
    work = folder / "provisioning"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, mode=0o700)
    (work / "project.json").write_text(json.dumps(_project(server, port, made), indent=1))
    command = [sys.executable, "-m", "nvflare.lighter.provision", "-p", "project.json", "-w", "kits"]
    result = subprocess.run(
        command, cwd=work, umask=0o077, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    kits = work / "kits" / "fedcustom" / "prod_00"
    if result.returncode or not kits.is_dir():
        output = (result.stdout + result.stderr).strip().splitlines() or ["no reason given"]
        raise DeploymentError(f"provisioning failed: {output[-1]}")
    (folder / "sites").mkdir(exist_ok=True)
    (kits / server).rename(folder / "server")
    (kits / ADMINISTRATOR).rename(folder / "admin")
    for site in made:
        (kits / site).rename(folder / "sites" / site)
    (work / "kits" / "fedcustom" / "state").rename(folder / "authority")
    shutil.rmtree(work)
    _configure_server(folder / "server")
    for site in made:
        configure_site(folder / "sites" / site)
    register_kits(folder)


def server_command(kit: Path) -> list[str]:
    """Command that starts the engine at the server, with its access list (:mod:`.server_train`)."""
    return [
        *(sys.executable, "-u", "-m", "fedcustom.deployment.nvflare.server_train", "-m", str(kit)),
        *("-s", "fed_server.json", "--set", "secure_train=true", "org=federation", "config_folder=config"),
    ]


def site_command(kit: Path) -> list[str]:
    """Command that starts the engine at a site, as its own ``startup/sub_start.sh`` does.

    Raises:
        DeploymentError: the folder is no site's kit.
    """
    return [
        *(sys.executable, "-u", "-m", "nvflare.private.fed.app.client.client_train", "-m", str(kit)),
        *("-s", "fed_client.json", "--set", "secure_train=true", f"uid={site_name(kit)}", "org=federation"),
        *("config_folder=config", f"heart_beat_interval={HEARTBEAT_INTERVAL}"),
    ]


def site_name(kit: Path) -> str:
    """The name of the site that a kit was made for.

    Raises:
        DeploymentError: the folder is no site's kit.
    """
    try:
        return str(json.loads((kit / "startup" / "fed_client.json").read_text())["client"]["fqsn"])
    except (OSError, ValueError, KeyError):
        raise DeploymentError(f"{kit}: is no site's start-up kit (no startup/fed_client.json)") from None


def _check_names(server: str, sites: Sequence[str]) -> None:
    if not HOST_NAME.fullmatch(server):
        raise DeploymentError(f"--server {server!r}: is no host name or address")
    if not sites:
        raise DeploymentError("--sites: name one site at least")
    for site in sites:
        if list(sites).count(site) > 1 or site in _reserved(server):
            raise DeploymentError(f"--sites: {site!r} is there twice, or is the server's name")
        check_site_name(site, server)


def check_site_name(name: str, server: str = "") -> None:
    """Refuse what cannot be a site's name.

    Raises:
        DeploymentError: a character that is not allowed, too long, or the server's or administrator's name.
    """
    if not SITE_NAME.fullmatch(name):
        raise DeploymentError(
            f"{name[:80]!r} cannot be a site's name; allowed: up to 63 letters, digits, '-', '_', '.'"
        )
    if name in _reserved(server):
        raise DeploymentError(f"{name!r} is the server's or the administrator's name; a site needs another")


def _reserved(server: str) -> set[str]:
    return {"server", "admin", server, ADMINISTRATOR}


def _project(server: str, port: int, sites: Sequence[str]) -> dict[str, Any]:
    builders = [
        ("workspace.WorkspaceBuilder", {"template_file": ["master_template.yml"]}),
        ("static_file.StaticFileBuilder", {"config_folder": "config", "scheme": "tcp"}),
        ("cert.CertBuilder", {"root_valid_days": AUTHORITY_DAYS}),
        ("signature.SignatureBuilder", {}),
    ]
    return {
        "api_version": 3,
        "name": "fedcustom",
        "description": "a federation of fedcustom",
        "participants": [
            {"name": server, "type": "server", "org": "federation", "fed_learn_port": port},
            {"name": ADMINISTRATOR, "type": "admin", "org": "federation", "role": "lead"},
            *({"name": site, "type": "client", "org": "federation"} for site in sites),
        ],
        "builders": [
            {"path": f"nvflare.lighter.impl.{path}", "args": arguments} for path, arguments in builders
        ],
    }


PERMISSIONS = {
    "submit_job": "any", "clone_job": "none", "manage_job": "n:submitter", "download_job": "none",
    "view": "any", "operate": "none", "shell_commands": "none", "byoc": "none",
    "server-predeployed-flwr": "none",
}  # fmt: skip
"""What the run's own process may do through the engine: start and stop its jobs. No job brings code ("byoc"),
and nobody reads a site's files through the engine."""


def _restrict_permissions(kit: Path) -> None:
    """Grant these permissions to the administrator and none to others: roles are claims of the server."""
    denied = dict.fromkeys(PERMISSIONS, "none")
    permissions = {"project_admin": denied, "org_admin": denied, "lead": PERMISSIONS, "member": denied}
    content = {"format_version": "1.0", "permissions": permissions}
    (kit / "local" / "authorization.json").write_text(json.dumps(content, indent=1))


def _configure_server(kit: Path) -> None:
    _restrict_permissions(kit)
    resources = _resources(kit)
    resources["class_allow_list"] = [CONTROLLER]
    resources["servers"][0]["heart_beat_timeout"] = HEARTBEAT_TIMEOUT
    storage = resources["snapshot_persistor"]["args"]["storage"]["args"]
    storage["root_dir"] = str((kit / "snapshots").absolute())
    for component in resources["components"]:
        if component["id"] == "job_manager":
            component["args"]["uri_root"] = str((kit / "jobs").absolute())
        if component["id"] == "job_scheduler":
            component["args"]["max_jobs"] = 100
    resources["components"] = [c for c in resources["components"] if c["id"] != "log_receiver"]
    _write(kit, resources)


def configure_site(kit: Path) -> None:
    """Let a site run this package's executor only, keep its log to itself, and grant nothing else."""
    _restrict_permissions(kit)
    resources = _resources(kit)
    resources["class_allow_list"] = [EXECUTOR]
    resources["allow_log_streaming"] = False  # a site's log is its own
    resources["components"] = [c for c in resources["components"] if c["id"] != "site_log_streamer"]
    _write(kit, resources)


def _resources(kit: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((kit / "local" / "resources.json.default").read_text())
    return found


def _write(kit: Path, resources: dict[str, Any]) -> None:
    (kit / "local" / "resources.json").write_text(json.dumps(resources, indent=1))
