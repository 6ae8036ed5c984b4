"""Memory of a site on its own disk: a version for each round, so that a run can go back to an earlier one."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable
from pathlib import Path

from ...core.files import read_json, read_tensors, write_folder, write_json, write_tensors
from ...methods.protocol import Memory


class RoundMemory:
    """Versioned memory of a client: one folder for each round that it worked in, written atomically."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def before(self, round_number: int) -> Memory:
        """The memory when a round began. Versions of this and later rounds, from before the run went back,
        are deleted.
        """
        for number in self._rounds():
            if number >= round_number:
                shutil.rmtree(self._path(number), ignore_errors=True)
        return self.after(round_number - 1)

    def after(self, round_number: int) -> Memory:
        """The memory after a round."""
        known = [number for number in self._rounds() if number <= round_number]
        if not known:
            return Memory()
        folder = self._path(known[-1])
        tensors = folder / "memory.safetensors"
        return Memory(read_tensors(tensors) if tensors.exists() else {}, read_json(folder / "memory.json"))

    def save(self, round_number: int, memory: Memory) -> None:
        """Save the memory after a round, or after one of its exchanges."""
        saved = copy.copy(memory)

        def fill(folder: Path) -> None:
            write_json(folder / "memory.json", saved.values)
            if saved.tensors:
                write_tensors(folder / "memory.safetensors", saved.tensors)

        write_folder(self._path(round_number), fill)

    def prune(self, checkpoints: Iterable[int]) -> None:
        """Delete the versions that the run, which goes back to one of these rounds at most, cannot need."""
        known, wanted = self._rounds(), sorted(checkpoints)
        if not wanted:
            return
        needed = {max((n for n in known if n <= number), default=-1) for number in wanted}
        for number in known:
            if number < wanted[-1] and number not in needed:
                shutil.rmtree(self._path(number), ignore_errors=True)

    def _rounds(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}"
