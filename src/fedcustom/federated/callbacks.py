"""Callbacks: the events of a run, for progress displays, logs and a user's own code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluation.metrics import Metrics
from ..recipe import Recipe
from .run_directory import History, Row


@dataclass(frozen=True)
class Outline:
    """The cost of a run, known before its first round.

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


class Callback:
    """Base class of callbacks: override the events of interest, the others do nothing.

    Examples:
        >>> class PrintLoss(fedcustom.Callback):
        ...     def on_round_end(self, row):
        ...         print(row["round"], row["train_loss"])
        >>> fedcustom.run("recipe.toml", callbacks=[PrintLoss()])

    A callback that raises does not lose the run: the round is finished and its checkpoint written, then the
    error is raised, and the run can be resumed. ``KeyboardInterrupt`` stops the run at once.
    """

    def on_run_start(self, recipe: Recipe, done: int, directory: Path) -> None:
        """The rounds begin, after ``done`` rounds of an earlier process. ``recipe`` is complete, and settled
        for the number of clients (:meth:`~fedcustom.recipe.Recipe.settled`).
        """

    def on_outline(self, outline: Outline) -> None:
        """The cost of the rounds to come, before the first of them."""

    def on_phase(self, text: str, done: int = 0, of: int = 0) -> None:
        """The present activity and, where clients are waited for, how many ``of`` them are ``done``. Called
        often. An empty text: none any more.
        """

    def on_round_start(self, number: int) -> None:
        """A round begins."""

    def on_evaluate(self, number: int, metrics: Metrics) -> None:
        """A round's state was evaluated on the development split; round 0 is the untuned model."""

    def on_round_end(self, row: Row) -> None:
        """A round is done; ``row`` is its line of ``metrics.jsonl``."""

    def on_checkpoint(self, number: int) -> None:
        """The checkpoint of a round is on the disk."""

    def on_note(self, text: str) -> None:
        """A warning or remark for the user."""

    def on_information(self, text: str) -> None:
        """A fact for the user that is no warning."""

    def on_run_end(self, summary: Mapping[str, Any]) -> None:
        """The run is finished; ``summary`` is the content of ``summary.json``."""


class HistoryWriter(Callback):
    """Appends each round's row to ``metrics.jsonl``."""

    def __init__(self, history: History) -> None:
        self.history = history

    def on_round_end(self, row: Row) -> None:
        """Bring the row to the disk."""
        self.history.append(row)


class Callbacks(Callback):
    """Several callbacks as one.

    An exception that one of them raises is kept in ``failure``, the first of several, and the others are
    called all the same; :meth:`raise_failure` raises it when the run can be resumed.

    Raises:
        TypeError: one of them is no instance of :class:`Callback`.
    """

    def __init__(self, callbacks: Sequence[Callback] = ()) -> None:
        self.callbacks = list(callbacks)
        for callback in self.callbacks:
            if not isinstance(callback, Callback):
                raise TypeError(f"callbacks: {callback!r} is no instance of fedcustom.Callback")
        self.failure: Exception | None = None

    @contextlib.contextmanager
    def joined(self, other: Callback) -> Iterator[None]:
        """Tell another one too, for as long as this is open."""
        self.callbacks.append(other)
        try:
            yield
        finally:
            self.callbacks.remove(other)

    def raise_failure(self) -> None:
        """Raise what a callback has raised, if one did."""
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure

    def _call(self, event: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            try:
                getattr(callback, event)(*arguments)
            except Exception as error:  # a user's own code, which must not lose the round
                self.failure = self.failure or error

    def on_run_start(self, recipe: Recipe, done: int, directory: Path) -> None:
        """Tell all."""
        self._call("on_run_start", recipe, done, directory)

    def on_outline(self, outline: Outline) -> None:
        """Tell all."""
        self._call("on_outline", outline)

    def on_phase(self, text: str, done: int = 0, of: int = 0) -> None:
        """Tell all."""
        self._call("on_phase", text, done, of)

    def on_round_start(self, number: int) -> None:
        """Tell all."""
        self._call("on_round_start", number)

    def on_evaluate(self, number: int, metrics: Metrics) -> None:
        """Tell all."""
        self._call("on_evaluate", number, metrics)

    def on_round_end(self, row: Row) -> None:
        """Tell all."""
        self._call("on_round_end", row)

    def on_checkpoint(self, number: int) -> None:
        """Tell all."""
        self._call("on_checkpoint", number)

    def on_note(self, text: str) -> None:
        """Tell all."""
        self._call("on_note", text)

    def on_information(self, text: str) -> None:
        """Tell all."""
        self._call("on_information", text)

    def on_run_end(self, summary: Mapping[str, Any]) -> None:
        """Tell all."""
        self._call("on_run_end", summary)
