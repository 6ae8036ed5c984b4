"""Base class of methods whose clients do not share a batch."""

from __future__ import annotations

from collections.abc import Sequence

from .messages import Task, Update
from .protocol import Client


class SequentialClients:
    """The verbs on several clients of one process, for a method that works for one client after the other."""

    def widest_cohort(self) -> int:
        """One: nothing is gained by more."""
        return 1

    def execute(self, task: Task, client: Client) -> Update:
        """The task done on the client's private data."""
        raise NotImplementedError

    def execute_together(self, pairs: Sequence[tuple[Task, Client]]) -> list[Update | Exception]:
        """Each client's answer, or the error that it met."""
        answers: list[Update | Exception] = []
        for task, client in pairs:
            try:
                answers.append(self.execute(task, client))
            except Exception as error:  # whatever one client does wrong, the others go on
                answers.append(error)
        return answers
