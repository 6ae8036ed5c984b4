"""Runs as they are now, read from their directories while other processes write there. Nothing is locked."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, cast

from ..core.errors import RunError
from ..federated.run_directory import LOCK
from ..report.read import Baseline, Round, Run, Summary, parse_round, read_recipe, read_summary

State = Literal["not started", "starting", "running", "stopped", "finished"]

ORDER: tuple[State, ...] = ("running", "starting", "not started", "stopped", "finished")
"""The order of runs on the page."""
READ = ("metrics.jsonl", "recipe.toml", "summary.json", "warnings.log", "run_id")
"""Files of a run that are read or looked for."""
MOST_RUNS = 60
"""Runs that are shown; of more, those that changed last."""
LONGEST_LOG = 20_000
"""Characters at the end of a log that are shown."""
SKIPPED = frozenset({"checkpoints", "clients", "model", "mlruns", "tensorboard", "wandb"})
"""Folders in which no run is looked for."""
TRAIN_LOSS = "train_loss"


@dataclass(frozen=True)
class LiveRun:
    """A run at one moment.

    Attributes:
        name: the directory as it was named, or from the folder that was.
        state: ``starting`` until the recipe is written; ``stopped`` where no process of this machine
            is at it.
        rounds: how many rounds its recipe has, 0 where that is not known yet.
        last_round: the last round that is done, None before the first.
        run: the run as a report takes it. Of one that is not finished, the scores are those of the last
            evaluated round on the development split.
        unreadable: lines of ``metrics.jsonl`` that are no rounds, and other files that cannot be read.
        changed: when a round was written last, in seconds since 1970; 0 before the first.
    """

    directory: Path
    name: str
    state: State
    rounds: int
    last_round: int | None
    run: Run
    unreadable: list[str] = field(default_factory=list)
    changed: float = 0.0


class Watched:
    """Run directories, and folders of some; what was read is kept, and read on from there."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = list(roots)
        self._histories: dict[Path, _History] = {}

    def runs(self) -> tuple[list[LiveRun], int]:
        """All runs as they are now, and how many more there are: those under way, then the others, each in
        the order of their names.
        """
        places = dict(self._places())
        chosen = sorted(places, key=_last_change, reverse=True)[:MOST_RUNS]
        shown = [self._read(place, places[place]) for place in places if place in chosen]
        return sorted(shown, key=lambda live: ORDER.index(live.state)), len(places) - len(shown)

    def signature(self) -> object:
        """A value that stays the same for as long as nothing of the runs changes."""
        found = []
        for place, _ in self._places():
            begun = (place / "recipe.toml").exists()
            files = [_stamp(place / name) for name in READ]
            found.append((place, _state(place, begun=begun), files))
        return found

    def _places(self) -> Iterator[tuple[Path, str]]:
        """Run directories with the names under which they are shown. A root without a run is one that has not
        started.
        """
        for root in self.roots:
            found = list(_runs_below(root))
            if not found:
                yield root, root.name or str(root)
            for place in found:
                alone = len(self.roots) == 1 and place != root
                base = root if alone else root.parent
                yield place, place.relative_to(base).as_posix()

    def _read(self, place: Path, name: str) -> LiveRun:
        history = self._histories.setdefault(place, _History(place / "metrics.jsonl"))
        rows = history.read()
        problems = [*history.problems]
        try:
            recipe, settings = read_recipe(place)
        except (RunError, OSError) as error:
            recipe, settings = "", {}
            problems.append(str(error))
        summary = None
        if (place / "summary.json").exists():
            try:
                summary = read_summary(place)
            except (RunError, OSError) as error:
                problems.append(str(error))
        state: State = "finished" if summary is not None else _state(place, begun=bool(recipe))
        rounds = int(settings.get("rounds.count", "0")) if settings.get("rounds.count", "0").isdigit() else 0
        shown = [_with_train_loss(row) for row in rows]
        run = Run(
            directory=place,
            name=name,
            summary=summary or _provisional(settings, shown, rounds),
            history=shown,
            recipe=recipe,
            settings=settings,
            environment={},
            warnings=_end_of(place / "warnings.log"),
            deployed=(place / "run_id").exists(),
        )
        last = rows[-1].round if rows else None
        return LiveRun(place, name, state, rounds, last, run, problems, history.changed)


@dataclass
class _History:
    """The rounds in a file that grows. A last line that is half written is left for the next time."""

    path: Path
    rows: list[Round] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    changed: float = 0.0
    _inode: int = 0
    _offset: int = 0
    _line: int = 0

    def read(self) -> list[Round]:
        """The rounds so far. A file that was written anew, as when a run goes on, is read from its
        beginning.
        """
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self.rows, self.problems, self._offset, self._line = [], [], 0, 0
                self._inode, self.changed = status.st_ino, status.st_mtime
                file.seek(self._offset)
                whole, end, _ = file.read().rpartition(b"\n")
        except OSError:
            self.rows, self.problems, self._inode, self._offset, self._line = [], [], 0, 0, 0
            return []
        self._offset += len(whole) + len(end)
        for line in whole.splitlines() if end else ():
            self._line += 1
            try:
                self.rows.append(parse_round(line, f"{self.path.name}, line {self._line}"))
            except RunError as error:
                self.problems.append(str(error))
        return list(self.rows)


def _runs_below(root: Path) -> Iterator[Path]:
    for folder, inner, files in os.walk(root):
        inner[:] = sorted(name for name in inner if name not in SKIPPED and not name.startswith("."))
        if {"recipe.toml", "metrics.jsonl", "summary.json", LOCK} & {*files}:
            yield Path(folder)
            inner.clear()


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes with a file's content; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _last_change(place: Path) -> float:
    times = [0.0]
    for name in ("metrics.jsonl", "recipe.toml", LOCK):
        try:
            times.append((place / name).stat().st_mtime)
        except OSError:
            continue
    return max(times)


def _state(place: Path, *, begun: bool) -> State:
    """The state of a run without summary. The lock is only looked at: to try it could keep a run from it."""
    try:
        text = (place / LOCK).read_text(encoding="ascii", errors="replace")
        if text.isdigit() and _is_alive(int(text)):
            return "running" if begun else "starting"
    except OSError:
        pass
    return "stopped" if begun else "not started"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def _provisional(settings: dict[str, str], rows: Sequence[Round], rounds: int) -> Summary:
    """What is known of a run's result before it is finished."""
    evaluated = [row for row in rows if row.development]
    baseline = settings.get("baseline", "federated")
    seed = settings.get("seed", "0")
    return Summary(
        method=settings.get("method.name", ""),
        baseline=cast(Baseline, baseline if baseline in ("centralised", "local") else "federated"),
        task=settings.get("data.task", "classification"),
        seed=int(seed) if seed.isdigit() else 0,
        metrics=dict(evaluated[-1].development) if evaluated else {},
        model=settings.get("model.base", ""),
        data=settings.get("data.source", ""),
        rounds=rounds,
    )


def _with_train_loss(row: Round) -> Round:
    """The round with its training loss among the scores, to be drawn like them."""
    if math.isnan(row.train_loss):  # the round did not train
        return row
    return replace(row, development={**row.development, TRAIN_LOSS: row.train_loss})


def _end_of(log: Path) -> str:
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - LONGEST_LOG))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
