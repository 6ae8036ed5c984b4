"""Client store: simulated clients and their private memories on disk."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from ..core.files import read_tensors, write_tensors
from ..data.examples import ClientData
from ..methods.protocol import Client, Memory


class ClientStore:
    """Opens clients with their memory, and keeps what they remember when they are done.

    Private numbers are held here; private tensors are written to ``folder`` under a name that is new in each
    round, so that a checkpoint's files stay as they were until a later checkpoint is complete. ``disks`` is
    where each client has a folder of its own, for methods that keep more than tensors.
    """

    def __init__(self, data: Mapping[str, ClientData], folder: Path, disks: Path | None = None) -> None:
        self.data = data
        self.folder = folder
        self.disks = disks
        self.memories: dict[str, dict[str, Any]] = {}
        self.files: dict[str, str] = {}

    def open(self, name: str) -> Client:
        """A client with its memory."""
        tensors = read_tensors(self.folder / self.files[name]) if name in self.files else {}
        memory = Memory(tensors, copy.deepcopy(self.memories.get(name, {})))
        disk = self.disks / folder_name(name) if self.disks is not None else None
        return Client(name, self.data[name], memory, disk)

    def close(self, client: Client, round_number: int) -> None:
        """Keep what the client remembers after a round, whose number makes the file's name new."""
        if client.memory.values or client.name in self.memories:
            self.memories[client.name] = client.memory.values
        if client.memory.tensors:
            digest = hashlib.sha256(client.name.encode()).hexdigest()[:16]
            file = f"{digest}-{round_number:06d}.safetensors"
            write_tensors(self.folder / file, client.memory.tensors)
            self.files[client.name] = file
        else:
            self.files.pop(client.name, None)

    def snapshot(self) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """What a checkpoint holds of it: private numbers, and names of files with private tensors."""
        return {name: dict(values) for name, values in self.memories.items()}, dict(self.files)

    def restore(self, round_number: int, memories: dict[str, dict[str, Any]], files: dict[str, str]) -> None:
        """Go back to what clients remembered after a round."""
        self.memories, self.files = memories, files

    def saved(self, rounds: Container[int]) -> None:
        """Nothing to do: files go with the checkpoints that name them."""


def folder_name(client: str) -> str:
    """A client's name as a folder's: itself where that is possible, told apart by a digest where not."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", client).strip(".")[:60]
    if plain and plain == client:
        return plain
    return f"{plain}-{hashlib.sha256(client.encode()).hexdigest()[:8]}"
