"""Something that is told how a run goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..recipe.recipe import Recipe
from .run_directory import Row


@dataclass(frozen=True)
class Outline:
    """What a run is going to ask, known before its first round.

    ``cohort`` clients take part in a round that trains; ``examples`` are the training examples of all
    ``clients``, None where only they know. ``down`` and ``up`` are the bytes of the messages to and from a
    client in such a round, in the mean, ``fitting`` those of all rounds that fit the head, ``searching``
    those of the search of a learning rate, and ``total`` those of the whole run; None where nothing is sent,
    or where it cannot be known beforehand.
    """

    clients: int
    cohort: int
    examples: int | None = None
    down: int | None = None
    up: int | None = None
    fitting: int | None = None
    searching: int | None = None
    total: int | None = None


class Progress(Protocol):
    """Something that is told how a run goes. :class:`Silent` is one to derive from."""

    def phase(self, text: str, done: int = 0, of: int = 0) -> None:
        """What is being done from now on and, where clients are waited for, by how many ``of`` them it is
        ``done``. It may be said often. An empty text: nothing any more.
        """

    def started(self, recipe: Recipe, done: int, directory: Path) -> None:
        """The rounds begin; ``done`` of them were done before. ``recipe`` is complete, and settled
        (:meth:`~fedcustom.recipe.recipe.Recipe.settled`).
        """

    def outlined(self, outline: Outline) -> None:
        """What the rounds are going to ask, before the first of them."""

    def round(self, row: Row) -> None:
        """A round is done; ``row`` is its line of ``metrics.jsonl``."""

    def note(self, text: str) -> None:
        """Something that the user should know."""

    def finished(self, summary: Mapping[str, Any]) -> None:
        """The run is finished."""


class Silent:
    """A progress that says nothing."""

    def phase(self, text: str, done: int = 0, of: int = 0) -> None: ...
    def started(self, recipe: Recipe, done: int, directory: Path) -> None: ...
    def outlined(self, outline: Outline) -> None: ...
    def round(self, row: Row) -> None: ...
    def note(self, text: str) -> None: ...
    def finished(self, summary: Mapping[str, Any]) -> None: ...
