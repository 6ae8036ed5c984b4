"""Connection of a run to its sites: sends requests, and checks what the sites reply."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..core.errors import UpdateError
from ..methods import State, Task
from ..methods.tuning.head_fit import without_label_counts
from ..privacy.secure_sum.protocol import RoundId
from ..transport.channel import Packed
from ..transport.messages import values_of
from .nvflare.messenger import Messenger, Request, SiteReply
from .replies import LabelList, Part, PartSizes, SiteStatistics

T = TypeVar("T")

OPENING_TIMEOUT = 600.0
"""Seconds that sites may take to read their data and load the base model."""


@dataclass(frozen=True)
class SiteFailure:
    """Why a site gave no usable reply. ``refused``: by its policy, so that asking again is in vain."""

    reason: str
    refused: bool = False


class SiteConnection:
    """Connection to the sites of one run, by the run's identifier. ``min_replies`` of a request is how many
    sites have to reply before the others are waited for no longer than the grace period.
    """

    def __init__(self, messenger: Messenger, run_id: str) -> None:
        self.messenger, self.run_id, self.note = messenger, run_id, messenger.note

    @property
    def reachable(self) -> frozenset[str]:
        """Names of the sites that requests reach at present."""
        return self.messenger.channel.sites

    def include_returned(self, names: Collection[str]) -> None:
        """Make the named sites reachable if they have connected lately."""
        self.messenger.include_returned(names)

    def describe(
        self, names: Sequence[str], recipe: Mapping[str, Any], min_replies: int
    ) -> Iterator[tuple[str, LabelList | SiteFailure]]:
        """Show sites the recipe; they reply with their labels."""
        request = Request(self._head("describe") | {"values": {"recipe": recipe}})
        replies = self.messenger.request(dict.fromkeys(names, request), min_replies, OPENING_TIMEOUT)
        return _checked(replies, LabelList.from_values)

    def open(
        self, names: Sequence[str], clients: Sequence[str], labels: Sequence[str], min_replies: int
    ) -> Iterator[tuple[str, PartSizes | SiteFailure]]:
        """Have sites load the base model and build the method; they reply with the sizes of their data.

        ``clients`` are all clients of the run, in its order.
        """
        values = {"names": list(clients), "labels": list(labels)}
        request = Request(self._head("open") | {"values": values})
        replies = self.messenger.request(dict.fromkeys(names, request), min_replies, OPENING_TIMEOUT)
        return _checked(replies, PartSizes.from_values)

    def execute_round(
        self,
        tasks: Mapping[str, Task],
        packed: Mapping[str, Packed],
        round_number: int,
        checkpoints: Sequence[int],
        min_replies: int,
        sealed: Mapping[str, str] | None = None,
    ) -> Iterator[tuple[str, SiteReply]]:
        """Have sites execute a round's tasks, whose tensors travel as in ``packed``; the replies are raw.

        ``checkpoints`` are the rounds that the run may go back to; sites forget what others need. ``sealed``
        is what each is sent of the others' shares in a secure sum.
        """
        requests = {}
        for name, task in tasks.items():
            head = self._head("work") | {"task": task.kind, "round": round_number, "keep": list(checkpoints)}
            head |= {"values": values_of(task), "layout": packed[name].layout}
            head |= {"secure": sealed[name]} if sealed is not None else {}
            requests[name] = Request(head, packed[name].tensors)
        return self.messenger.request(requests, min_replies) if requests else iter(())

    def execute(self, tasks: Mapping[str, Task], min_replies: int) -> Iterator[tuple[str, SiteReply]]:
        """Have sites execute tasks outside rounds, of which they remember nothing; the replies are raw."""
        requests = {
            name: Request(self._head("work") | {"task": task.kind, "values": values_of(task)}, task.tensors)
            for name, task in tasks.items()
        }
        return self.messenger.request(requests, min_replies)

    def secure(
        self, messages: Mapping[str, str], stage: str, round_id: RoundId, min_replies: int
    ) -> Iterator[tuple[str, SiteReply]]:
        """Have sites answer one stage of a secure sum beside its work; the replies are raw."""
        requests = {}
        for name, message in messages.items():
            values: dict[str, Any] = {"stage": stage, "round": round_id.number, "message": message}
            values |= {"exchange": round_id.exchange} if round_id.exchange > 1 else {}
            requests[name] = Request(self._head("secure") | {"values": values})
        return self.messenger.request(requests, min(min_replies, len(requests))) if requests else iter(())

    def evaluate(
        self, names: Sequence[str], state: State, part: Part, after: int, labels: int
    ) -> Iterator[tuple[str, SiteStatistics | SiteFailure]]:
        """Have sites evaluate a state on one part of their data, with their memory ``after`` a round.

        ``labels`` is the number of labels, 0 for anything but classification.
        """
        values = without_label_counts(state.values)
        head = self._head("evaluate") | {"part": part, "after": after, "values": values}
        requests = dict.fromkeys(names, Request(head, state.tensors))
        replies = self.messenger.request(requests, min(1, len(names)))
        return _checked(replies, lambda values: SiteStatistics.from_values(values, labels))

    def _head(self, kind: str) -> dict[str, Any]:
        return {"kind": kind, "run": self.run_id}


def _checked(
    replies: Iterator[tuple[str, SiteReply]], parse: Callable[[Mapping[str, Any]], T]
) -> Iterator[tuple[str, T | SiteFailure]]:
    """Replies as values of their type; an unsound one is a failure."""
    for name, reply in replies:
        if reply.failure:
            yield name, SiteFailure(reply.failure, reply.refused)
            continue
        try:
            yield name, parse(reply.values)
        except UpdateError as error:
            yield name, SiteFailure(str(error))
