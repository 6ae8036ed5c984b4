"""The run directory: its lock, recipe, environment, history and checkpoints (docs/run_directory.md)."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..core import environment
from ..core.errors import RunError
from ..core.files import (
    held,
    holder,
    read_json,
    read_tensors,
    write_folder,
    write_json,
    write_tensors,
    write_text,
)
from ..core.tensors import named, part
from ..core.text import printable
from ..evaluation.metrics import Metrics, is_better
from ..methods.protocol import State
from ..models.load import Base
from ..recipe import Recipe, recorded_recipe, to_toml
from ..recipe.paths import absolute
from ..updates.identity import Identity, in_words
from .base_model import ENVIRONMENT

Row = dict[str, Any]
"""One line of ``metrics.jsonl``: a round's figures."""

TRANSFORMS = "transforms.json"
"""The file of the caller's transforms of updates, where there are any."""

LOCK = "run.pid"
"""The file that the process at work on a run holds."""

UNTUNED = "untuned"
"""The key of the untuned model's metrics in a checkpoint's values."""


class RunDirectory:
    """A run's directory: opened for one process at a time, so that a run can be resumed and is never mixed
    with another one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.history = History(path / "metrics.jsonl")
        self.checkpoints = Checkpoints(path / "checkpoints")

    def finished(
        self, recipe: Recipe, transforms: Sequence[Identity] = (), *, resume: bool
    ) -> dict[str, Any] | None:
        """The summary where the directory holds the finished run of this recipe with these transforms of the
        caller's; None where there is work to do.

        Raises:
            RunError: it holds another run, an unfinished one without ``resume``, or other files.
        """
        path, written = self.path, self.path / "recipe.toml"
        if path.exists() and not path.is_dir():
            raise RunError(f"{path}: is a file; name a folder")
        if written.exists():
            old = absolute(recorded_recipe(written))
            if old.identity != recipe.identity:
                difference = _difference(old.identity, recipe.identity)
                raise RunError(f"{path}: holds another recipe's run ({difference}); name another --out")
            begun = read_json(path / TRANSFORMS) if (path / TRANSFORMS).exists() else []
            if begun != list(transforms):
                raise RunError(
                    f"{path}: holds a run with other transforms of updates ({in_words(begun)} there, "
                    f"{in_words(transforms)} here); name another --out"
                )
            if (path / "summary.json").exists():
                summary: dict[str, Any] = read_json(path / "summary.json")
                return summary
            if not resume:
                raise RunError(f"{path}: holds an unfinished run; go on with --resume, or name another --out")
        elif path.exists() and any(file.name not in (LOCK, TRANSFORMS) for file in path.iterdir()):
            raise RunError(f"{path}: is not empty and holds no run; name another --out")
        return None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for this process; one in which nothing was begun is removed after an error.

        Raises:
            RunError: another process is at this run.
        """
        with held(self.path / LOCK) as alone:
            if not alone:
                other = holder(self.path / LOCK)
                raise RunError(f"{self.path}: process {other} is at this run; wait for it, or stop it")
            try:
                yield
            except BaseException:
                if [file.name for file in self.path.iterdir()] == [LOCK]:
                    shutil.rmtree(self.path)
                raise

    def describe(self, recipe: Recipe, base: Base, transforms: Sequence[Identity] = ()) -> None:
        """Write the recipe with the caller's transforms, and the versions and machine it is run with, where
        they are not there yet.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / "recipe.toml").exists():
            (self.path / TRANSFORMS).unlink(missing_ok=True)  # of a start that came no further
            if transforms:
                write_json(self.path / TRANSFORMS, list(transforms))
            write_text(self.path / "recipe.toml", to_toml(recipe))
        if not (self.path / ENVIRONMENT).exists():
            record_environment(self.path, base)

    def last_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint, to go on from; rows of later rounds are dropped. None: start anew."""
        rounds = self.checkpoints.rounds()
        if not rounds:
            if self.history.path.exists():
                self.history.path.unlink()
            return None
        checkpoint = self.checkpoints.load(rounds[-1])
        self.history.rows = History.read(self.history.path).rows
        self.history.keep_until(checkpoint.round_number)
        return checkpoint

    def best_round(self, recipe: Recipe) -> int:
        """The round so far with the best development score, or the last evaluated one where the recipe keeps
        that; 0 if there is none.
        """
        metric, best, value = recipe.metric, 0, None
        for row in self.history.rows:
            if "development" not in row or row["round"] == 0:
                continue
            new = row["development"][metric]
            if value is None or recipe.evaluation.select == "last" or is_better(new, value, metric):
                best, value = row["round"], new
        return best

    def warn(self, text: str, detail: str = "") -> None:
        """Add a warning to ``warnings.log``."""
        with (self.path / "warnings.log").open("a", encoding="utf-8") as file:
            file.write(f"{_now()} {printable(text, lines=False)}\n{printable(detail)}")


def _difference(old: Recipe, new: Recipe) -> str:
    """The first setting in which two recipes differ."""

    def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for key, sub in value.items():
                yield from flat(sub, f"{path}.{key}" if path else key)
        else:
            yield path, value

    before, after = dict(flat(old.model_dump())), dict(flat(new.model_dump()))
    key = next(key for key in [*before, *after] if before.get(key) != after.get(key))
    return f"{key} = {before.get(key)!r} there, {after.get(key)!r} here"


def record_environment(folder: Path, base: Base) -> None:
    """Write the versions and the machine that the base model is used with, and in which precision
    (``environment.json``).
    """
    found = {
        **environment.describe(),
        "precision": base.precision,
        "device": ", ".join(map(str, base.devices)),
    }
    if base.quantised:
        found["quantised"] = base.quantised.in_words()
    if base.measured:
        found["precision_seconds"] = {name: round(s, 4) for name, s in base.measured.items()}
    write_json(folder / ENVIRONMENT, {**found, "started": _now()})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass
class History:
    """``metrics.jsonl``: one line a round, appended as the rounds go."""

    path: Path
    rows: list[Row] = field(default_factory=list)

    def append(self, row: Row) -> None:
        """Add a round's line and bring it to the disk."""
        line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)

    def keep_until(self, round_number: int) -> None:
        """Drop the lines of later rounds, which a checkpoint does not know."""
        self.rows = [row for row in self.rows if row["round"] <= round_number]
        write_text(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows))

    @classmethod
    def read(cls, path: Path) -> History:
        """The lines of a file; none where there is no file. A last line that a kill cut off is left out.

        Raises:
            RunError: a line is not JSON; names it.
        """
        if not path.exists():
            return cls(path)
        text = path.read_text(encoding="utf-8", errors="replace")
        lines = text.split("\n")[:-1]
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise RunError(f"{path}, line {number}: not JSON: {error.msg}") from None
        return cls(path, rows)


@dataclass(frozen=True)
class Checkpoint:
    """Everything that is needed to go on after a round: the server's state and the clients' memories.

    ``memories`` holds each client's private numbers; its private tensors are in the file that ``files``
    names. ``untuned`` are the untuned model's metrics on the test split, where it was evaluated.
    """

    round_number: int
    state: State
    memories: dict[str, dict[str, Any]]
    files: dict[str, str]
    untuned: Metrics = field(default_factory=dict)


class Checkpoints:
    """``checkpoints/``: a folder a round, which appears whole; the newest and the best are kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clients = folder / "clients"

    def save(self, checkpoint: Checkpoint, keep: Iterable[int]) -> None:
        """Write a round's checkpoint, then remove the others but those of the rounds in ``keep``."""
        state = checkpoint.state
        content = {
            "round": checkpoint.round_number,
            "values": {**({UNTUNED: checkpoint.untuned} if checkpoint.untuned else {}), **state.values},
            "memories": checkpoint.memories,
            "files": checkpoint.files,
        }

        def fill(folder: Path) -> None:
            tensors = named(state.tensors, "global/") | named(state.server, "server/")
            write_tensors(folder / "state.safetensors", tensors)
            write_json(folder / "state.json", content)

        write_folder(self._path(checkpoint.round_number), fill)
        kept = {checkpoint.round_number, *keep}
        for number in self.rounds():
            if number not in kept:
                shutil.rmtree(self._path(number), ignore_errors=True)
        self._remove_unused(kept)

    def mapped(self, checkpoint: Checkpoint) -> State:
        """The state of a checkpoint that was saved, its tensors read from the file where they are used, so
        that a large state takes no memory while clients train.
        """
        tensors = read_tensors(self._path(checkpoint.round_number) / "state.safetensors")
        return State(part(tensors, "global/"), part(tensors, "server/"), checkpoint.state.values)

    def load(self, round_number: int) -> Checkpoint:
        """The checkpoint of a round.

        Raises:
            RunError: it is not there or damaged.
        """
        folder = self._path(round_number)
        content = read_json(folder / "state.json")
        tensors = read_tensors(folder / "state.safetensors")

        untuned = content["values"].pop(UNTUNED, {})
        content["values"].pop("method", None)  # a report of the round, which earlier versions kept there
        state = State(part(tensors, "global/"), part(tensors, "server/"), content["values"])
        return Checkpoint(content["round"], state, content["memories"], content["files"], untuned)

    def rounds(self) -> list[int]:
        """The rounds of which there is a checkpoint, in order."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name.removeprefix("round-")) for path in self.folder.glob("round-*"))

    def _path(self, round_number: int) -> Path:
        return self.folder / f"round-{round_number:06d}"

    def _remove_unused(self, rounds: Iterable[int]) -> None:
        """Remove private tensors that no kept checkpoint names."""
        if not self.clients.is_dir():
            return
        used = {
            name for number in rounds if self._path(number).exists()
            for name in read_json(self._path(number) / "state.json")["files"].values()
        }  # fmt: skip
        for path in self.clients.iterdir():
            if path.name not in used:
                path.unlink(missing_ok=True)
