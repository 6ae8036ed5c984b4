"""Membership in a federation at this moment: who may be put into a job, and whose certificates run out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..core.errors import DeploymentError
from .nvflare.access_list import FILE as ACCESS_FILE
from .nvflare.access_list import AccessList
from .settings import FILE, load_federation


class Membership:
    """The members of a federation, as its files say at the moment of the question.

    A member is named in ``federation.toml`` and has a certificate that is accepted. While ``federation.toml``
    cannot be read, because somebody edits it, the names read last hold; ``note`` is told once.
    """

    def __init__(self, folder: Path, note: Callable[[str], None]) -> None:
        self.file, self.note = folder / FILE, note
        self.access_list = AccessList(folder / "server" / ACCESS_FILE)
        self._sites, self._state = frozenset(load_federation(folder).sites), self._stat()
        self._problem = ""

    def __call__(self) -> frozenset[str]:
        """Names of the members."""
        state = self._stat()
        if state != self._state:
            self._state = state
            try:
                self._sites = frozenset(load_federation(self.file.parent).sites)
            except DeploymentError as error:
                self.note(f"{error}; the members are those of before")
        members = self._sites & self.access_list.names()
        if self.access_list.problem and self.access_list.problem != self._problem:
            self.note(self.access_list.problem)
        self._problem = self.access_list.problem
        return members

    def _stat(self) -> tuple[int, int] | None:
        try:
            found = self.file.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size


def check_certificates(folder: Path, note: Callable[[str], None]) -> None:
    """Before a run: warn of certificates that expire within 30 days.

    Raises:
        DeploymentError: the server's, the administrator's or the authority's own certificate has expired, so
            that no run is possible; or the federation was made by an earlier version.
    """
    from .nvflare.authority import current, register
    from .nvflare.certificates import read_certificate

    if not (folder / "server" / ACCESS_FILE).exists():
        raise DeploymentError(
            f"{folder}: its server has no access list (server/{ACCESS_FILE}): it was made by an earlier "
            "version; make it again with fedcustom deploy init"
        )
    own = {
        "the authority": folder / "server" / "startup" / "rootCA.pem",
        "the server": folder / "server" / "startup" / "server.crt",
        "the administrator": folder / "admin" / "startup" / "client.crt",
    }
    for who, file in own.items():
        certificate = read_certificate(file)
        remedy = "renew it: fedcustom deploy renew"
        if who == "the authority":
            remedy = "make a new federation: fedcustom deploy init"
        if certificate.expired():
            raise DeploymentError(f"the certificate of {who} {certificate.state()}; {remedy}")
        if certificate.due():
            note(f"the certificate of {who} {certificate.state()}; {remedy}")
    if not (folder / "authority").is_dir():  # kept elsewhere
        return
    entries = register(folder)
    for name in load_federation(folder).sites:
        found = current(entries, name)
        if found is not None and found.due():
            note(f"the certificate of {name} {found.state()}; renew it: fedcustom deploy renew {name}")
