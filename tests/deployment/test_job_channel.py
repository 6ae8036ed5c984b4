"""Membership of a job: a site whose engine was restarted has left it; without the engine."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedcustom.core.errors import DeploymentError
from fedcustom.deployment.nvflare import job_channel
from fedcustom.deployment.nvflare.bridge import Bridge, BridgeListener, connect
from fedcustom.deployment.nvflare.job_channel import JobChannel
from fedcustom.deployment.nvflare.jobs import registrations


def reply(**tokens: str) -> dict[str, Any]:
    """What the engine's server says to ``check_status``."""
    header = ["CLIENT", "FQCN", "FQSN", "LEAF", "TOKEN", "LAST CONNECT TIME"]
    rows = [[name, name, name, "True", token, "Sun Nov 29 12:08:21 2026"] for name, token in tokens.items()]
    clients = [{"client_name": name, "fqcn": name} for name in tokens]
    return {
        "data": [
            {"type": "string", "data": "Engine status: started"},
            {"type": "table", "rows": [["JOB_ID", "APP NAME"], ["9ca8", "app"]]},
            *([{"type": "table", "rows": [header, *rows]}] if tokens else []),
        ],
        "meta": {"status": "ok", "server_status": "started", "clients": clients},
    }  # fmt: skip


def test_registrations_are_digests_of_the_tokens() -> None:
    found = registrations(reply(north="t1", south="t2"))
    assert found == {
        "north": hashlib.sha256(b"t1").hexdigest()[:16],
        "south": registrations(reply(south="t2"))["south"],
    }
    assert registrations(reply()) == {}
    bare = reply(north="t1")
    bare["data"] = bare["data"][:2]
    assert registrations(bare) == {"north": ""}, "connected, though its registration is not shown"


@pytest.mark.parametrize(
    "bad", [{}, {"status": "ERROR_INACTIVE_SESSION", "details": "later"}, {"meta": {"status": "error"}}]
)
def test_no_success_is_an_error(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"later|no reason given"):
        registrations(bad)


class FakeSession:
    """The engine, which starts a job with all sites that are registered."""

    def __init__(self, file: Path) -> None:
        self.file, self.registered, self.jobs = file, dict[str, str](), list[list[str]]()
        self.controllers: list[Bridge] = []
        self.down = False

    def registrations(self) -> dict[str, str]:
        if self.down:
            raise DeploymentError("the server cannot be reached")
        return dict(self.registered)

    def submit(self, sites: list[str]) -> str:
        self.jobs.append(sites)
        threading.Thread(target=self._start, args=(sites,), daemon=True).start()
        return str(len(self.jobs))

    def _start(self, sites: list[str]) -> None:
        bridge = connect(self.file)
        self.controllers.append(bridge)
        bridge.send({"kind": "ready", "sites": sites, "process": 1})

    def status(self, job: str) -> str:
        return "FINISHED:COMPLETED"

    def abort(self, job: str) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def channel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notes: list[str]) -> Iterator[JobChannel]:
    monkeypatch.setattr(job_channel, "POLL_INTERVAL", 0.0)
    listener = BridgeListener(tmp_path / "bridge.json")
    made = JobChannel(tmp_path, listener, notes.append, lambda: frozenset({"north", "south"}))
    made.session = FakeSession(listener.file)  # type: ignore[assignment]
    made.session.registered = {"north": "n1", "south": "s1"}  # type: ignore[attr-defined]
    made.start([], time.monotonic() + 10.0)
    yield made
    made.close()


def test_a_site_that_registers_again_has_left_the_job(channel: Any, notes: list[str]) -> None:
    assert channel.sites == {"north", "south"}
    channel.session.registered["south"] = "s2"
    assert channel.connected() == {"north", "south"}
    assert channel.sites == {"north"}
    assert notes[-1] == "south registered again: it has left job 1"
    channel.connected()
    assert len(notes) == 2, "said once"
    channel.restart()
    channel.start([], time.monotonic() + 10.0)
    assert channel.sites == {"north", "south"}
    channel.connected()
    assert channel.sites == {"north", "south"}, "its new registration is that of the new job"


def test_no_news_of_a_site_is_not_a_new_registration(channel: Any) -> None:
    channel.session.down = True
    assert channel.connected() == frozenset()
    assert channel.sites == {"north", "south"}
    channel.session.down = False
    channel.session.registered = {"north": "", "south": "s1"}
    channel.connected()
    assert channel.sites == {"north", "south"}
    del channel.session.registered["south"]
    assert channel.connected() == {"north"}
    assert channel.sites == {"north", "south"}, "the engine says so itself, when its patience is over"


@pytest.mark.parametrize("how", ["registered again", "lost"])
def test_a_job_without_sites_is_followed_by_another(channel: Any, how: str) -> None:
    """Also where the engine gave up every site: nobody waits for a job in which nobody is."""
    for site in ("north", "south"):
        if how == "lost":
            message = {"kind": "answer", "number": 0, "site": site, "lost": "CLIENT_DEAD"}
            channel.session.controllers[0].send(message)
            assert channel.receive(5.0).lost == "CLIENT_DEAD"
        else:
            channel.session.registered[site] += "+"
            channel.connected()
    assert channel.sites == frozenset()
    assert channel.session.controllers[0].receive(5.0) == {"kind": "end"}
    channel.start([], time.monotonic() + 10.0)
    assert (channel.sites, channel.job_number) == ({"north", "south"}, 2)
