"""What a message becomes on its way between server and client, and how long it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..methods.contract import Memory, Task, Update
from ..tensors import Tensors, add, subtract, zeros_like
from . import wire
from .compression import compress, compress_with_feedback, decompress
from .settings import CompressionSettings

RESIDUAL = "residual/"


class Channel:
    """Compresses what travels as the recipe says.

    ``start`` is the state that server and clients can both compute from the recipe: what goes down is
    compressed relative to it.
    """

    def __init__(self, settings: CompressionSettings, start: Mapping[str, Tensor]) -> None:
        self.settings = settings
        self.start = start if settings.down else {}
        self._last: tuple[list[Tensor], Tensors, Tensors] = ([], {}, {})

    def down(self, task: Task) -> tuple[Task, int]:
        """A task as the client gets it, and the length of its message in bytes."""
        values = {"kind": task.kind, **task.values}
        if not self.settings.down or self.settings.kind == "none" or not task.tensors:
            return task, wire.length(task.tensors, values)
        tensors, packed = self._compressed(task.tensors)
        return replace(task, tensors=tensors), wire.length(packed, values)

    def up(self, update: Update, memory: Memory) -> tuple[Update, int]:
        """An update as the server gets it, and the length of its message in bytes. With error feedback the
        client remembers what was lost.
        """
        values = {"weight": update.weight, **update.values}
        if self.settings.kind == "none" or not update.tensors:
            return update, wire.length(update.tensors, values)
        if self.settings.error_feedback:
            residual = zeros_like({n: t.float() for n, t in update.tensors.items()}) | {
                name: memory.tensors[RESIDUAL + name]
                for name in update.tensors
                if RESIDUAL + name in memory.tensors
            }
            packed, residual = compress_with_feedback(update.tensors, residual, self.settings)
            memory.tensors = memory.tensors | {RESIDUAL + name: t for name, t in residual.items()}
        else:
            packed = compress(update.tensors, self.settings)
        received = decompress(packed, update.tensors, self.settings)
        return replace(update, tensors=received), wire.length(packed, values)

    def _compressed(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        """The tensors as they come out of their compressed form, and that; once for a whole cohort."""
        given = list(tensors.values())
        known, result, packed = self._last
        if len(known) == len(given) and all(a is b for a, b in zip(known, given, strict=True)):
            return result, packed
        origin = {name: self._origin(name, tensor) for name, tensor in tensors.items()}
        packed = compress(subtract(tensors, origin), self.settings)
        result = add(origin, decompress(packed, tensors, self.settings))
        self._last = (given, result, packed)
        return result, packed

    def _origin(self, name: str, tensor: Tensor) -> Tensor:
        """What a tensor is sent relative to: its start, or nothing where it has none of that shape."""
        start = self.start.get(name)
        return start if start is not None and start.shape == tensor.shape else torch.zeros_like(tensor)
