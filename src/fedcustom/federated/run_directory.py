"""The files of a run directory that grow with the run: its history and its checkpoints."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import RunError
from ..core.files import read_json, read_tensors, write_folder, write_json, write_tensors, write_text
from ..core.tensors import named, part
from ..methods.protocol import State

Row = dict[str, Any]


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
    names.
    """

    round_number: int
    state: State
    memories: dict[str, dict[str, Any]]
    files: dict[str, str]


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
            "values": state.values,
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

        state = State(part(tensors, "global/"), part(tensors, "server/"), content["values"])
        return Checkpoint(content["round"], state, content["memories"], content["files"])

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
