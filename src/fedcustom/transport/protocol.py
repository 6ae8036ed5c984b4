"""How tasks reach clients and their updates come back, wherever the clients are."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ..aggregation.settings import AggregationSettings
from ..core.errors import RecipeError
from ..methods.messages import Task, Update
from ..updates.transform import UpdateTransform


@dataclass(frozen=True)
class Reply:
    """What came back from one client: an update, or the reason why there is none.

    ``task`` is as the client got it, ``update`` as the server did. ``bytes_down`` and ``bytes_up`` are the
    lengths of their messages, ``seconds`` the client's work.

    Where the server is shown sums only, a client's reply without an update is ``summed`` if its update is in
    the sum that follows; that one's ``clients`` are those of which it is the sum.
    """

    client: str
    task: Task
    update: Update | None
    reason: str
    detail: str
    bytes_down: int
    bytes_up: int
    seconds: float
    summed: bool = False
    clients: tuple[str, ...] = ()


class Transport(Protocol):
    """How tasks reach clients and their updates come back."""

    def exchange(
        self, tasks: Mapping[str, Task], round_number: int, absent: Container[str] = ()
    ) -> Iterator[Reply]:
        """Give each client its task and yield the replies, in the tasks' order; a client's failure is a
        reply, not an error. A round may take several exchanges.
        """


@runtime_checkable
class SumTransport(Protocol):
    """A transport that shows the server the sum of a cohort's updates, and no client's own."""

    def exchange_sum(
        self, tasks: Mapping[str, Task], round_number: int, absent: Container[str] = ()
    ) -> Iterator[Reply]:
        """As :meth:`Transport.exchange`, but clients' replies bring no update; after them comes one more with
        the sum of all.
        """


def check_visible(
    transport: object, transforms: Sequence[UpdateTransform], aggregation: AggregationSettings
) -> None:
    """Refuse what needs each client's update where the server is only shown their sum.

    Raises:
        RecipeError: names the rule or the transform.
    """
    if not isinstance(transport, SumTransport):
        return
    if aggregation.needs_individual_updates:
        raise RecipeError(
            f"aggregation.rule = {aggregation.rule!r}: looks at each client's change, and the server sees "
            "only their sum; use 'mean'"
        )
    for transform in transforms:
        if transform.needs_individual_updates:
            raise RecipeError(
                f"{transform.name}: needs single clients' updates, and only their sum is seen; leave it out"
            )
        if transform.changes_bytes and not transform.is_linear:
            raise RecipeError(
                f"{transform.name}: codes cannot be added up, and the server sees only sums; leave it out"
            )
