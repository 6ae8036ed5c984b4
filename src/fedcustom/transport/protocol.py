"""What came back from one client."""

from __future__ import annotations

from dataclasses import dataclass

from ..methods.protocol import Task, Update


@dataclass(frozen=True)
class Reply:
    """What came back from one client: an update, or the reason why there is none.

    ``task`` and ``update`` are as they came out of the channel. ``bytes_down`` and ``bytes_up`` are the
    lengths of their messages, ``seconds`` the client's work.
    """

    client: str
    task: Task
    update: Update | None
    reason: str
    detail: str
    bytes_down: int
    bytes_up: int
    seconds: float
