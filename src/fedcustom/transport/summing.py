"""Transport of a simulation that adds up clients' vectors as sites across organisations do, without masks."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import replace

from ..core.errors import SecureSumError, UpdateError
from ..methods.messages import Task
from ..privacy.secure_sum.integers import Numbers, zeros
from .protocol import Reply, Transport
from .secure import check_same_clients, closed
from .summed import Summation, SumVector


class SummingTransport:
    """Transport of a simulation that shows sums only (:class:`~.protocol.SumTransport`): another transport's
    updates as integers, added up. A sum of fewer clients than the summation's terms say is not made, nor in a
    further exchange of a round one of others than in the first.
    """

    def __init__(self, inner: Transport, summation: Summation) -> None:
        self.inner, self.summation = inner, summation

    def exchange(
        self, tasks: Mapping[str, Task], round_number: int, absent: Container[str] = ()
    ) -> Iterator[Reply]:
        """The same as :meth:`exchange_sum`."""
        return self.exchange_sum(tasks, round_number, absent)

    def exchange_sum(
        self, tasks: Mapping[str, Task], round_number: int, absent: Container[str] = ()
    ) -> Iterator[Reply]:
        """Each client's reply without its update, in the tasks' order, and the sum."""
        total, replies, vector = zeros(0, 32), list[Reply](), None
        for reply in self.inner.exchange(tasks, round_number, absent):
            if reply.update is None:
                replies.append(reply)
                continue
            try:
                vector = vector or self.summation.vector(reply.task)
                numbers = vector.encode(reply.update, reply.client, self.summation.terms.needed(len(tasks)))
            except (SecureSumError, UpdateError) as error:
                replies.append(replace(reply, update=None, reason=str(error), detail=f"{error}\n"))
                continue
            total = numbers if not len(total) else total + numbers
            replies.append(replace(reply, update=None, summed=True))
        yield from closed(replies, lambda sites: self._opened(tasks, total, vector, sites))

    def _opened(
        self, tasks: Mapping[str, Task], total: Numbers, vector: SumVector | None, sites: tuple[str, ...]
    ) -> Reply:
        needed = self.summation.terms.needed(len(tasks))
        if len(sites) < needed:
            raise SecureSumError(f"{len(sites)} clients have sent their changes, {needed} are needed")
        check_same_clients(tasks[sites[0]], tasks, sites)
        assert vector is not None
        return vector.opened(total, sites)
