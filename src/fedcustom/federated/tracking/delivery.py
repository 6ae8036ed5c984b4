"""Delivery: a run's figures go to each tracker in a thread of its own, and the run does not wait.

Rounds are delivered once their checkpoint is on the disk: a run that is resumed never repeats them, so what a
tracker has stays true. What could not be delivered is tried again with the next checkpoint, and at the end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from ...core.errors import FedcustomError
from ...core.files import read_json, write_json
from ...recipe import Recipe
from ..callbacks import Callback
from ..run_directory import History, Row
from . import figures
from .tracker import Known, Outcome, Start, Tracker
from .variables import held

FILE = "tracking.json"
"""The file in a run's directory that says where the run is tracked: ids of the trackers' runs."""

LONGEST = 300
"""Characters of a failure's reason."""

Say = Callable[[str], None]


class Records:
    """``tracking.json``: what is remembered of each tracker, under its name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    def of(self, tracker: Tracker) -> Known:
        """What is known of a tracker in its present place; nothing where it tracked elsewhere before."""
        found = self._read().get(tracker.name, {})
        return found if found.get("place") == tracker.place else {}

    def write(self, tracker: Tracker, known: Known) -> None:
        """Remember a tracker."""
        with self._lock:
            write_json(self.path, {**self._read(), tracker.name: {**known, "place": tracker.place}})

    def _read(self) -> dict[str, Known]:
        content = read_json(self.path) if self.path.exists() else {}
        return content if isinstance(content, dict) else {}


class Follower:
    """One tracker, with the thread that it works in."""

    def __init__(self, tracker: Tracker, start: Start, records: Records) -> None:
        self.tracker, self.start, self.records = tracker, start, records
        self.failure: str | None = None
        self.delivered = 0
        """Rows that the tracker has."""
        self.complete = False
        """Whether it has everything, the final figures too."""
        self._known: Known = {}
        self._is_open = False
        self._rows: list[Row] = []
        self._summary: Mapping[str, Any] | None = None
        self._outcome: Outcome | None = None
        self._wake, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._work, name=f"tracker {tracker.name}", daemon=True)

    def begin(self, rows: Sequence[Row], summary: Mapping[str, Any] | None = None) -> None:
        """Start the thread, with the rows of earlier processes."""
        self.add(rows, summary)
        self._thread.start()

    def add(self, rows: Sequence[Row], summary: Mapping[str, Any] | None = None) -> None:
        """Have more rows, or the summary, delivered. Returns at once."""
        with self._lock:
            self._rows += rows
            self._summary = summary or self._summary
        self._wake.set()

    def end(self, outcome: Outcome) -> None:
        """Have the tracker closed when everything is delivered or was tried once more. Returns at once."""
        self._outcome = outcome
        self._wake.set()

    def wait(self, seconds: float) -> bool:
        """Wait for the end of the thread; whether it has ended."""
        self._thread.join(max(0.0, seconds))
        return not self._thread.is_alive()

    def missing(self) -> int:
        """How many rows the tracker does not have."""
        with self._lock:
            return len(self._rows) - self.delivered

    def _work(self) -> None:
        with held(self.tracker.variables):
            self._follow()

    def _follow(self) -> None:
        outcome = None
        while outcome is None:
            self._wake.wait()
            self._wake.clear()
            outcome = self._outcome  # read first: what was added before it is delivered below
            self._try(self._deliver)
        if self._is_open:
            self._try(lambda: self.tracker.close(outcome))

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except (Exception, SystemExit) as error:  # a library of others, which must not stop the run
            text = str(error).strip().splitlines()
            kind = "" if isinstance(error, FedcustomError) else f"{type(error).__name__}: "
            self.failure = self.failure or (kind + (text[0] if text else "no reason given"))[:LONGEST]

    def _deliver(self) -> None:
        if not self._is_open:
            self._known = self.tracker.open(self.start, self.records.of(self.tracker))
            self._is_open = True
            self.records.write(self.tracker, self._known)
        with self._lock:
            rows, summary = self._rows[self.delivered :], self._summary
        for row in rows:
            self.tracker.log(row["round"], figures.of_round(row))
            self.delivered += 1
        if rows:
            self.records.write(self.tracker, self._known)
        if summary is not None and not self.complete:
            self.tracker.finish(summary["rounds"], figures.of_summary(summary))
            self.records.write(self.tracker, {**self._known, "complete": True})
            self.complete = True


class Delivery(Callback):
    """Tells trackers of a run.

    Args:
        trackers: The trackers.
        seconds: How long the run waits for all of them together at its end.
        warn: Told of the first failure of each tracker.
        inform: Told what a tracker lacks at the end.
        name: What trackers call the run; None: as its directory.
        group: Under which name they group it.
    """

    def __init__(
        self,
        trackers: Sequence[Tracker],
        seconds: float,
        warn: Say,
        inform: Say,
        name: str | None = None,
        group: str | None = None,
    ) -> None:
        self.trackers, self.seconds, self.warn, self.inform = trackers, seconds, warn, inform
        self.name, self.group = name, group
        self.followers: list[Follower] = []
        self._warned: set[str] = set()
        self._waiting: list[Row] = []

    def on_run_start(self, recipe: Recipe, done: int, directory: Path) -> None:
        """Begin, with the rounds that are done already."""
        self._begin(recipe, directory, self.trackers)

    def on_round_end(self, row: Row) -> None:
        """Keep a round until its checkpoint is written."""
        self._waiting.append(deepcopy(row))
        self._tell()

    def on_checkpoint(self, number: int) -> None:
        """Deliver the rounds so far."""
        rows, self._waiting = self._waiting, []
        for follower in self.followers:
            follower.add(rows)
        self._tell()

    def on_run_end(self, summary: Mapping[str, Any]) -> None:
        """Deliver the result."""
        for follower in self.followers:
            follower.add((), summary)

    def deliver_finished(self, recipe: Recipe, directory: Path, summary: Mapping[str, Any]) -> None:
        """Deliver what trackers lack of a run that was finished before."""
        records = Records(directory / FILE)
        lacking = [tracker for tracker in self.trackers if not records.of(tracker).get("complete")]
        self._begin(recipe, directory, lacking, summary)

    def close(self, outcome: Outcome) -> None:
        """Let every tracker end, and wait for a bounded time."""
        for follower in self.followers:
            follower.end(outcome)
        until = time.monotonic() + self.seconds
        late = [each for each in self.followers if not each.wait(until - time.monotonic())]
        for follower in late:
            follower.failure = follower.failure or f"no answer within {self.seconds:g} s"
        self._tell()
        for follower in self.followers:
            missing, name = follower.missing(), follower.tracker.name
            if missing or (outcome == "finished" and not follower.complete):
                self.inform(
                    f"tracking: {name} lacks {missing} of {missing + follower.delivered} rounds"
                    + ("" if follower.complete else " and the result")
                    + "; the same command with --resume delivers them"
                )

    def _begin(
        self,
        recipe: Recipe,
        directory: Path,
        trackers: Sequence[Tracker],
        summary: Mapping[str, Any] | None = None,
    ) -> None:
        rows = History.read(directory / "metrics.jsonl").rows
        parameters, text = figures.parameters(recipe), figures.recipe_text(recipe)
        start = Start(directory, self.name or directory.name, self.group, parameters, text)
        self.followers = [Follower(tracker, start, Records(directory / FILE)) for tracker in trackers]
        for follower in self.followers:
            follower.begin(rows, summary)

    def _tell(self) -> None:
        """Warn of failures, each tracker's first; in the run's own thread."""
        for follower in self.followers:
            name = follower.tracker.name
            if follower.failure is not None and name not in self._warned:
                self._warned.add(name)
                self.warn(f"tracking: {name}: {follower.failure}; the run goes on")
