"""How long a request waits for its sites, and one that registered again; without the engine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from fedcustom.deployment.nvflare.job_channel import ReceivedMessage
from fedcustom.deployment.nvflare.messenger import Messenger, Request, Timeouts

SITES = ["first", "second", "last"]


class FakeChannel:
    """A channel whose sites answer at once, but for those that are ``silent`` or ``away``."""

    def __init__(self, silent: set[str], away: set[str]) -> None:
        self.silent, self.away = silent, away
        self.sites, self.job_number, self.starts = frozenset(SITES) - away, 1, 0
        self.answers: list[ReceivedMessage] = []
        self.sent: list[tuple[int, str]] = []

    def members(self) -> frozenset[str]:
        return frozenset(SITES)

    def connected(self) -> frozenset[str]:
        return frozenset(SITES) - self.away

    def start(self, expected: Any, deadline: float) -> None:
        if not self.sites:
            self.sites, self.starts = self.connected(), self.starts + 1
            self.job_number += 1

    def restart(self) -> None:
        self.sites = frozenset()

    def send(self, site: str, head: str, body: Path | None, reply_path: Path, max_bytes: int) -> int:
        self.sent.append((self.job_number, site))
        if site not in self.silent:
            self.answers.append(ReceivedMessage(len(self.sent), site, {"values": {}}, None, ""))
        return len(self.sent)

    def cancel(self, number: int) -> None:
        pass

    def receive(self, timeout: float) -> ReceivedMessage | None:
        if self.answers:
            return self.answers.pop(0)
        time.sleep(0.02)
        return None


def ask(tmp_path: Path, channel: Any, min_replies: int, **timeouts: float) -> tuple[dict[str, str], float]:
    """The failure of each site's reply, and the seconds that the request took."""
    limits = Timeouts(**({"round": 0.4, "grace": 0.4, "quorum": 4.0} | timeouts))
    messenger = Messenger(channel, tmp_path / "spool", limits, 1000, lambda _: None)
    began = time.monotonic()
    replies = messenger.request(dict.fromkeys(SITES, Request({"kind": "work"})), min_replies)
    found = {site: reply.failure for site, reply in replies}
    assert list(found) == SITES
    return found, time.monotonic() - began


@pytest.mark.parametrize("gone", SITES)
@pytest.mark.parametrize("kind", ["silent", "away"])
def test_a_site_that_is_gone_costs_the_rounds_time_whatever_its_place(
    tmp_path: Path, gone: str, kind: str
) -> None:
    channel = FakeChannel({gone} if kind == "silent" else set(), {gone} if kind == "away" else set())
    found, seconds = ask(tmp_path, channel, min_replies=2)
    reason = {"silent": "no answer in time", "away": "not connected"}[kind]
    assert found == {site: reason if site == gone else "" for site in SITES}
    assert 0.4 <= seconds < 2.0, "the round's time, not the time for enough sites to be there"


@pytest.mark.parametrize("there", SITES)
def test_too_few_replies_are_waited_for_whatever_their_place(tmp_path: Path, there: str) -> None:
    channel = FakeChannel(set(SITES) - {there}, set())
    found, seconds = ask(tmp_path, channel, min_replies=2, quorum=1.5)
    assert found == {site: "" if site == there else "no answer in time" for site in SITES}
    assert 1.5 <= seconds < 3.0


def test_a_refusal_is_not_one_of_the_replies_that_are_enough(tmp_path: Path) -> None:
    channel = FakeChannel({"last"}, set())
    channel.answers = []
    send = channel.send

    def refuse(site: str, *rest: Any) -> int:
        number = send(site, *rest)
        if site == "first":
            channel.answers[-1] = ReceivedMessage(number, site, {"refused": "no"}, None, "")
        return number

    channel.send = refuse  # type: ignore[method-assign]
    found, seconds = ask(tmp_path, channel, min_replies=2, quorum=1.5)
    assert found == {"first": "refused: no", "second": "", "last": "no answer in time"}
    assert 1.5 <= seconds < 3.0


@pytest.mark.parametrize("replaced", SITES)
def test_a_site_that_registered_again_is_asked_in_the_next_job_of_the_same_round(
    tmp_path: Path, replaced: str
) -> None:
    channel = FakeChannel({replaced}, set())
    receive = channel.receive

    def lose(timeout: float) -> ReceivedMessage | None:
        if channel.sites == frozenset(SITES) and channel.job_number == 1 and not channel.answers:
            channel.sites -= {replaced}  # as JobChannel.connected does
            channel.silent = set()
        return receive(timeout)

    channel.receive = lose  # type: ignore[method-assign]
    found, seconds = ask(tmp_path, channel, min_replies=2, round=30.0, quorum=60.0, grace=30.0)
    assert found == dict.fromkeys(SITES, "")
    assert channel.sent == [*((1, site) for site in SITES), (2, replaced)]
    assert channel.starts == 1
    assert seconds < 5.0


def test_a_site_that_is_back_is_waited_for_while_others_are_at_work(tmp_path: Path) -> None:
    """The time of grace is for sites that are away, not for the others' training."""
    channel = FakeChannel({"first"}, {"last"})
    receive, began = channel.receive, time.monotonic()

    def slow(timeout: float) -> ReceivedMessage | None:
        channel.away = set()  # back, but not in the job
        if time.monotonic() - began > 1.0 and channel.silent:
            channel.silent = set()
            channel.answers.append(ReceivedMessage(1, "first", {"values": {}}, None, ""))
        return receive(timeout)

    channel.receive = slow  # type: ignore[method-assign]
    found, seconds = ask(tmp_path, channel, min_replies=1, round=30.0, quorum=60.0, grace=0.3)
    assert found == dict.fromkeys(SITES, "")
    assert seconds < 5.0
