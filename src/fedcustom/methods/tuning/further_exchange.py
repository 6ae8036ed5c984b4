"""Exchanges of a round beside training: what the server and the clients do in them.

A state whose values have :data:`~fedcustom.methods.protocol.UNFINISHED` names the kind of the task that is
asked next. Kinds belong to the fit of the head (:mod:`.head_fit`), or to an exchange that a method's own rule
needs (:meth:`~.aggregation_hooks.AggregationHooks.further`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from ...core.tensors import Tensors
from ..messages import ChangeUpdate, Messages, Task, Update
from ..protocol import Aggregate, Answer, Client, State


class ServerExchange(Protocol):
    """The server's side of exchanges whose tasks are of kinds of their own."""

    def tasks(self, state: State, names: Iterable[str], round_number: int) -> dict[str, Task]:
        """What is asked of those of the clients that have more to say, by name."""

    def check(self, task: Task, update: Update) -> None:
        """Refuse what is not a sound answer (:class:`~fedcustom.core.errors.UpdateError`)."""

    def aggregate(self, kind: str, state: State, answers: Iterable[Answer]) -> Aggregate:
        """The state after an exchange of tasks of this kind.

        Raises:
            AggregationError: without more answers the round comes to nothing.
        """


class FurtherExchange(ServerExchange, Protocol):
    """An exchange after that of training, by a method's own rule, with its clients' side. Its answers are
    merged by their weighted mean.
    """

    @property
    def messages(self) -> Messages:
        """Its kind of task, with the update that answers it."""

    def forms(self, task: Task) -> Tensors:
        """Names, shapes and dtypes of the answer's tensors, which take no memory."""

    def execute(self, task: Task, client: Client) -> ChangeUpdate:
        """What a client answers, from what it remembers of its training in this round.

        Raises:
            UpdateError: the task is unsound, or the client remembers nothing of that round.
        """

    def first_task(self, sent: Tensors, round_number: int) -> Task:
        """A task of the form that follows a round of training from what was ``sent``; for estimates of
        message lengths.
        """
