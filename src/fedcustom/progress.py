"""Something that is told how a run goes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from .directory import Row
from .recipe import Recipe


class Progress(Protocol):
    """Something that is told how a run goes."""

    def started(self, recipe: Recipe, done: int, directory: Path) -> None:
        """The rounds begin; ``done`` of them were done before."""

    def round(self, row: Row) -> None:
        """A round is done; ``row`` is its line of ``metrics.jsonl``."""

    def note(self, text: str) -> None:
        """Something that the user should know."""

    def finished(self, summary: Mapping[str, Any]) -> None:
        """The run is finished."""


class Silent:
    """A progress that says nothing."""

    def started(self, recipe: Recipe, done: int, directory: Path) -> None: ...
    def round(self, row: Row) -> None: ...
    def note(self, text: str) -> None: ...
    def finished(self, summary: Mapping[str, Any]) -> None: ...
