"""The clients of a simulation and their private memories, which live on disk as a site's would."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data.examples import ClientData
from ..files import read_tensors, write_tensors
from ..methods.contract import Client, Memory


class ClientStore:
    """Opens clients with their memory, and keeps what they remember when they are done.

    Private numbers are held here; private tensors are written to ``folder`` under a name that is new in each
    round, so that a checkpoint's files stay as they were until a later checkpoint is complete.
    """

    def __init__(self, data: Mapping[str, ClientData], folder: Path) -> None:
        self.data = data
        self.folder = folder
        self.memories: dict[str, dict[str, Any]] = {}
        self.files: dict[str, str] = {}

    def open(self, name: str) -> Client:
        """A client with its memory."""
        tensors = read_tensors(self.folder / self.files[name]) if name in self.files else {}
        return Client(name, self.data[name], Memory(tensors, copy.deepcopy(self.memories.get(name, {}))))

    def close(self, client: Client, label: str) -> None:
        """Keep what the client remembers; ``label`` makes the file's name new."""
        if client.memory.values:
            self.memories[client.name] = client.memory.values
        if client.memory.tensors:
            digest = hashlib.sha256(client.name.encode()).hexdigest()[:16]
            file = f"{digest}-{label}.safetensors"
            write_tensors(self.folder / file, client.memory.tensors)
            self.files[client.name] = file
