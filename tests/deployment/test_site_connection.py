"""What a run believes of its sites' replies, and who takes part in it; without the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from fedcustom.core.errors import DeploymentError, UpdateError
from fedcustom.deployment.connection import SiteConnection
from fedcustom.deployment.nvflare.messenger import Request, SiteReply
from fedcustom.deployment.participants import agree, united_labels
from fedcustom.deployment.replies import LabelList, PartSizes, SiteStatistics
from fedcustom.evaluation.statistics import mean_statistics
from fedcustom.recipe.recipe import load_recipe


class FakeMessenger:
    """Answers each request by a function of the site and the request's head."""

    def __init__(self, reply: Callable[[str, Mapping[str, Any]], SiteReply], *connected: str) -> None:
        self.reply, self.notes, self.heads = reply, list[str](), list[Mapping[str, Any]]()
        self.channel = SimpleNamespace(sites=frozenset(connected))
        self.note = self.notes.append

    def request(
        self, requests: Mapping[str, Request], min_replies: int, timeout: float | None = None
    ) -> Iterator[tuple[str, SiteReply]]:
        for site, request in requests.items():
            self.heads.append(request.head)
            yield site, self.reply(site, request.head)


def reply(site: str, head: Mapping[str, Any]) -> SiteReply:
    """Three sites: one is sound, one refuses, and one comes late with a label of its own."""
    if site == "south":
        return SiteReply(failure="refused: policy.methods: method 'prefix' is not allowed here")
    if head["kind"] == "describe":
        return SiteReply({"labels": ["a", "b"] if site == "north" else ["a", "z"], "rows": 9})
    return SiteReply({"sizes": {"train": 7, "development": 1, "test": 1}})


def connected(*sites: str) -> Any:
    messenger: Any = FakeMessenger(reply, *sites)
    return messenger


def test_sites_that_refuse_take_no_part() -> None:
    messenger = connected("north", "south")
    found = agree(SiteConnection(messenger, "0" * 16), load_recipe({}), ["north", "south"], 1)
    assert (found.labels, found.sizes) == (["a", "b"], {"north": PartSizes(7, 1, 1)})
    assert list(found.refused) == ["south"]
    assert messenger.heads[-1] == {
        "kind": "open", "run": "0" * 16, "values": {"names": ["north", "south"], "labels": ["a", "b"]},
    }  # fmt: skip
    with pytest.raises(DeploymentError, match=r"1 of 2 sites take part, 2 are needed; south: refused"):
        agree(SiteConnection(messenger, "0" * 16), load_recipe({}), ["north", "south"], 2)


def test_a_site_with_unknown_labels_cannot_join() -> None:
    messenger = connected("north", "late")
    found = agree(SiteConnection(messenger, "0" * 16), load_recipe({}), ["north"], 1)
    found.admit(["north", "late", "away"])
    assert found.refused == {"late": "has labels that no other site has: ['z']"}
    asked = len(messenger.heads)
    found.admit(["north", "late", "away"])
    assert len(messenger.heads) == asked, "who is refused is not asked again"


def test_malformed_replies_are_read_as_nothing() -> None:
    assert LabelList.from_values({"labels": ["a", 2, 0.5], "rows": 3}) == LabelList(["a", 2, 0.5], 3)
    for labels in (None, "ab", [["a"]], [None], {"a": 1}):
        assert LabelList.from_values({"labels": labels}) == LabelList([])
    sizes = {"train": -1, "development": 2, "test": 2**40, "other": 3}
    assert PartSizes.from_values({"sizes": sizes}) == PartSizes(0, 2, 0)
    for values in ({}, {"sizes": [1, 2, 3]}, {"sizes": {"train": True, "test": "9"}}):
        assert PartSizes.from_values(values) == PartSizes()


def test_replies_are_written_as_they_are_read() -> None:
    sizes = PartSizes(3, 2, 1)
    assert PartSizes.from_values(sizes.to_values()) == sizes
    assert [sizes.of(part) for part in ("train", "development", "test")] == [3, 2, 1]
    statistics = SiteStatistics(personalised=mean_statistics({"loss": 2.0}, {}, 4))
    assert list(statistics.to_values()) == ["own"]
    assert SiteStatistics.from_values(statistics.to_values(), 0) == statistics
    assert SiteStatistics.from_values({"other": 1}, 0) == SiteStatistics()


@pytest.mark.parametrize("whole", [None, 3, {"examples": 0}, {"examples": 1, "sums": {"loss": "low"}}])
def test_unsound_statistics_of_a_site_are_an_error(whole: Any) -> None:
    with pytest.raises(UpdateError):
        SiteStatistics.from_values({"whole": whole}, 0)


def test_labels_that_are_numbers_are_in_their_order() -> None:
    assert united_labels([10, 9, 9, 1]) == ["1", "9", "10"]
    # One site's file has numbers, another's (a CSV file) has their texts: the labels are the same.
    assert united_labels(["10", 9, "9", "1"]) == ["1", "9", "10"]
    assert united_labels(["10", 9, "one"]) == ["10", "9", "one"]


def test_labels_of_one_site_do_not_rewrite_those_of_others() -> None:
    """A site finds its own labels by their texts: 1.0 or true of another must not take the place of 1."""
    assert united_labels([1.0, True, 2.0, 1, 2, 10]) == ["1", "1.0", "10", "2", "2.0", "True"]


@pytest.mark.parametrize(
    "labels",
    [["a", ""], ["x" * 101], list(range(10_001)), [*range(9_999)]],
    ids=["empty", "long", "many", "most"],
)
def test_labels_that_sites_refuse_leave_out_who_told_them(labels: list[Any]) -> None:
    """Else the other sites, which open no run with such labels, would all refuse it."""

    def reply(site: str, head: Mapping[str, Any]) -> SiteReply:
        if head["kind"] == "describe":
            return SiteReply({"labels": ["a", "b"] if site != "bad" else labels, "rows": 9})
        return SiteReply({"sizes": {"train": 7, "development": 1, "test": 1}})

    messenger: Any = FakeMessenger(reply)
    found = agree(SiteConnection(messenger, "0" * 16), load_recipe({}), ["bad", "north", "south"], 2)
    assert found.labels == ["a", "b"]
    assert set(found.sizes) == {"north", "south"}
    assert any("bad" in note and "label" in note for note in messenger.notes)
    with pytest.raises(DeploymentError, match="2 of 3 sites take part, 3 are needed"):
        agree(SiteConnection(messenger, "0" * 16), load_recipe({}), ["bad", "north", "south"], 3)
