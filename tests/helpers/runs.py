"""What a run directory holds, for comparison, and runs that are stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch

import fedcustom
from fedcustom.core.tensors import Tensors
from fedcustom.federated.run_directory import History, Row


def tensors_of(directory: Path) -> Tensors:
    """The tensors of the exported model, from its one file."""
    (path,) = (directory / "model").glob("*.safetensors")
    return dict(safetensors.torch.load_file(path))


def rows_of(directory: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``, from round 0."""
    return History.read(directory / "metrics.jsonl").rows


def without_seconds(row: dict[str, Any]) -> dict[str, Any]:
    """A round without what differs between two runs of the same code."""
    return {key: value for key, value in row.items() if key not in ("seconds", "peak_memory_bytes")}


class StopAt(fedcustom.Callback):
    """Raises after a round, whose checkpoint is written first."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_round_end(self, row: Row) -> None:
        """Raise, if it is this one."""
        if row["round"] == self.number:
            raise RuntimeError("stopped")
