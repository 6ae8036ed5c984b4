"""Memories of the clients in a deployed run: kept on the sites' own disks, and addressed by round."""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from ..core.allocator import release_freed_memory
from ..core.files import write_text


class RemoteMemories:
    """Memories at the sites, under the run's identifier: which rounds of them the run refers to.

    ``run_file`` is where the run's directory keeps that identifier.

    Attributes:
        after: the round after which sites' memories are meant, in an evaluation.
        checkpoints: the rounds that the run may go back to.
    """

    def __init__(self, run_file: Path, run_id: str) -> None:
        self.run_file, self.run_id = run_file, run_id
        self.after = 0
        self.checkpoints: list[int] = []

    def advance(self, round_number: int) -> None:
        """A round has ended: evaluate with what sites remember of it."""
        self.after = round_number

    def snapshot(self) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """Nothing, because a checkpoint need not hold what sites have on their disks; the first one makes the
        run's directory keep the run's identifier.
        """
        if not self.run_file.exists():
            write_text(self.run_file, self.run_id)
        return {}, {}

    def restore(self, round_number: int, memories: dict[str, dict[str, Any]], files: dict[str, str]) -> None:
        """Go back to what sites remembered after a round; its successor's tasks make them do so."""
        self.after = round_number

    def saved(self, rounds: Container[int]) -> None:
        """Checkpoints of these rounds are on disk: the next tasks let sites forget what others need."""
        assert isinstance(rounds, Sequence)
        self.checkpoints = [int(number) for number in rounds]
        release_freed_memory()
