"""Jobs of the engine: their configuration, and the session with the server that submits and watches them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ...core.errors import DeploymentError
from .streams import share_stream_timers

T = TypeVar("T")

CONTROLLER = "fedcustom.deployment.nvflare.controller.ServerController"
EXECUTOR = "fedcustom.deployment.nvflare.executor.SiteExecutor"
"""The only classes that a job may name, at the server and at a site."""

ADMINISTRATOR = "lead@fedcustom.org"
"""The one user that a federation is provisioned with; jobs are submitted in this name."""

FINISHED = "FINISHED"
"""Prefix of the status of a job that is over."""


def write_job(folder: Path, sites: list[str]) -> None:
    """Write the folder of a job for these sites: two configurations, and no code."""
    meta = {
        "name": "fedcustom",
        "resource_spec": {},
        "min_clients": 1,
        "deploy_map": {"app": ["server", *sites]},
    }
    server = {
        "format_version": 2,
        "server": {"task_request_interval": 0.05},
        "dead_client_grace_period": 5.0,
        "dead_client_check_lead_time": 2.0,
        "workflows": [{"id": "relay", "path": CONTROLLER, "args": {}}],
    }
    client = {
        "format_version": 2,
        "executors": [
            {
                "tasks": ["*"],
                "executor": {"path": EXECUTOR, "args": {}},
            }
        ],
    }
    config = folder / "app" / "config"
    config.mkdir(parents=True)
    (folder / "meta.json").write_text(json.dumps(meta))
    (config / "config_fed_server.json").write_text(json.dumps(server))
    (config / "config_fed_client.json").write_text(json.dumps(client))


def registrations(reply: Mapping[str, Any]) -> dict[str, str]:
    """The connected sites in the server's reply to ``check_status``, each with a digest of its registration.

    A site that registers again, because its engine was restarted, has a different digest: the server gave it
    a new token. The digest is empty where the reply shows no token. The token itself is a credential and is
    not kept.

    Raises:
        ValueError: the reply is no success.
    """
    meta = reply.get("meta")
    if not isinstance(meta, Mapping) or meta.get("status", "ok") != "ok" or "server_status" not in meta:
        raise ValueError(str(reply.get("details") or reply.get("status") or "no reason given"))
    tokens: dict[str, str] = {}
    for item in reply.get("data") or []:
        header, *rows = item.get("rows") or [[]]
        if "CLIENT" in header and "TOKEN" in header:
            name, token = header.index("CLIENT"), header.index("TOKEN")
            tokens |= {row[name]: hashlib.sha256(str(row[token]).encode()).hexdigest()[:16] for row in rows}
    names = [str(client["client_name"]) for client in meta.get("clients") or []]
    return {name: tokens.get(name, "") for name in names}


class Session:
    """Administrator's session with the engine's server, reopened whenever it was lost.

    Every method raises :class:`~fedcustom.core.errors.DeploymentError` if the server cannot be reached.
    """

    def __init__(self, kit: Path) -> None:
        self.kit = kit
        self._session: Any = None

    def connected(self) -> list[str]:
        """The sites whose heartbeats reach the server."""
        return list(self.registrations())

    def registrations(self) -> dict[str, str]:
        """The sites whose heartbeats reach the server, each with a digest of its registration."""
        return self._call(lambda s: registrations(s.api.do_command("check_status server")))

    def submit(self, sites: list[str]) -> str:
        """Submit a job for these sites; its id."""
        folder = self.kit / "job"  # not a temporary folder, which a killed process would leave behind
        shutil.rmtree(folder, ignore_errors=True)
        write_job(folder / "fedcustom", sites)
        return str(self._call(lambda s: s.submit_job(str(folder / "fedcustom"))))

    def status(self, job: str) -> str:
        """A job's status, in the engine's words; that of a job that is over begins with FINISHED."""
        return str(self._call(lambda s: s.get_job_meta(job)).get("status", ""))

    def abort(self, job: str) -> None:
        """End a job, if it has not ended yet."""
        with contextlib.suppress(DeploymentError):
            self._call(lambda s: s.abort_job(job))

    def close(self) -> None:
        """Close the session; without this the engine's threads keep the process alive."""
        session, self._session = self._session, None
        if session is not None:
            with contextlib.suppress(Exception):
                session.close()

    def _call(self, action: Callable[[Any], T]) -> T:
        from nvflare.fuel.flare_api.flare_api import new_secure_session

        try:
            with contextlib.redirect_stdout(io.StringIO()):  # the engine prints while it connects
                if self._session is None:
                    share_stream_timers()
                    self._session = new_secure_session(ADMINISTRATOR, str(self.kit), timeout=5.0)
                return action(self._session)
        except Exception as error:  # the engine has dozens of ways to say that it is not there
            self.close()
            reason = (str(error).splitlines() or [""])[0]
            raise DeploymentError(f"the server cannot be reached: {type(error).__name__}: {reason}") from None
