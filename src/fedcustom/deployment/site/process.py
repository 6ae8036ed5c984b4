"""Processes of a site: the resident process and the engine, both supervised."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from ...core.errors import DeploymentError
from ...core.files import held, holder
from ..nvflare.bridge import ADDRESS_VARIABLE, LIMIT_VARIABLE
from ..nvflare.kits import require_nvflare, site_command, site_name
from ..nvflare.supervision import SupervisedProcess, keep_alive
from .ledger import Ledger
from .limits import CANCEL_FILE, check_platform
from .rows import ACCEPT, DataChanged
from .settings import load_site


def start_site(
    kit: Path,
    file: Path,
    note: Callable[[str], None],
    stopped: Callable[[], bool],
    *,
    data_changed: DataChanged = "refuse",
) -> None:
    """Take part in the federation that the kit is for, until ``stopped()``.

    A run that this site has begun with other rows is refused, unless ``data_changed`` is ``"accept"``; it is
    noted either way.

    Only outgoing connections are made, to the server's one port. Everything that this site writes is in
    ``<kit>/fedcustom``: its memory, ``audit.jsonl`` (what left), ``errors.log``, and the processes' logs.

    Raises:
        DeploymentError: no kit, a file that is not in order, or a process that does not start.
    """
    require_nvflare()
    from ..nvflare.certificates import restrict_permissions

    kit, file = kit.absolute(), file.absolute()
    name, settings = site_name(kit), load_site(file)
    check_certificate(kit, note)
    for part in ("train", "development", "test", "public"):
        named = getattr(settings.data, part)
        if named is not None and not (file.parent / named).expanduser().is_file():
            raise DeploymentError(f"{file}: data.{part} = {named!r}: no such file")
    own = kit / "fedcustom"
    os.umask(0o077)  # all that this process writes from here on is in the kit
    restrict_permissions(kit)
    check_platform(settings.policy.max_memory_gigabytes)
    Ledger(own / "ledger.json")  # a damaged one is an error here, not in the logs of a process
    resident = SupervisedProcess(
        [
            *(sys.executable, "-m", "fedcustom.deployment.site", str(kit), str(file)),
            *([ACCEPT] if data_changed == "accept" else []),
        ],
        own / "resident.log",
    )
    environment = {
        ADDRESS_VARIABLE: str(own / "bridge.json"),
        LIMIT_VARIABLE: str(int(settings.policy.max_request_gigabytes * 1e9)),
        "MALLOC_ARENA_MAX": "2",
    }
    engine = SupervisedProcess(site_command(kit), own / "engine.log", environment)
    with held(own / "site.pid") as acquired:
        if not acquired:
            raise DeploymentError(f"{kit}: process {holder(own / 'site.pid')} runs this site already")
        note(f"site {name}: logs and audit log are in {own}")
        changes = changes_told(own / "audit.jsonl")

        def told() -> bool:
            for text in next(changes):
                note(f"site {name}: {text}")
            return stopped()

        if not keep_alive([resident, engine], note, told):
            raise DeploymentError(f"site {name}: a process does not start; see the logs in {own}")


def changes_told(audit: Path) -> Iterator[list[str]]:
    """What a site's audit log says of rows that have changed, from now on: at each step, what is new."""
    place = audit.stat().st_size if audit.exists() else 0
    while True:
        found = list[str]()
        if audit.exists() and audit.stat().st_size > place:
            with audit.open("rb") as file:
                file.seek(place)
                whole = file.read().rpartition(b"\n")[0]  # a last line may be half written
            place += len(whole) + 1 if whole else 0
            events = [json.loads(line) for line in whole.splitlines()]
            found = [f"run {e['run']}: {e['text']}" for e in events if e["event"] == "data changed"]
        yield found


def check_certificate(kit: Path, note: Callable[[str], None]) -> None:
    """Warn from 30 days before a site's certificate expires.

    Raises:
        DeploymentError: it has expired, or the kit has none.
    """
    from ..nvflare.certificates import read_certificate

    certificate = read_certificate(kit / "startup" / "client.crt")
    remedy = (
        f"ask the federation's administrator for a new one (fedcustom deploy renew {certificate.name}), "
        f"then: fedcustom site install {kit} {certificate.name}.signed.zip"
    )
    if certificate.expired():
        raise DeploymentError(f"{kit}: its certificate {certificate.state()}; {remedy}")
    if certificate.due():
        note(f"this site's certificate {certificate.state()}; {remedy}")


def cancel_task(kit: Path) -> None:
    """Have the task that a site is working on stopped; without one nothing happens.

    Raises:
        DeploymentError: the folder is no site's kit.
    """
    site_name(kit)
    (kit / "fedcustom").mkdir(parents=True, exist_ok=True)
    (kit / "fedcustom" / CANCEL_FILE).touch()
