"""Channel: packing of messages between server and client, and their lengths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.tensors import Tensors, add, subtract
from ..methods.messages import Task, Update
from ..methods.protocol import Values
from ..updates.compression import compress, decompress
from ..updates.layout import Layout, describe, laid_out
from ..updates.settings import CompressionSettings
from ..updates.transform import EncodedUpdate
from . import wire
from .messages import values_of

LAYOUT = "layout"


@dataclass(frozen=True)
class Packed:
    """Tensors as they travel and, where they are compressed, what the receiver must know of their form."""

    tensors: Tensors
    layout: Layout = None

    @classmethod
    def of(cls, update: Update) -> Packed:
        """What travels of an update beside its weight and values."""
        return cls(update.tensors, update.layout if isinstance(update, EncodedUpdate) else None)

    def update(self, answer: Update) -> Update:
        """The update of which this travelled; ``answer`` has what travelled beside its tensors."""
        if self.layout is None:
            return replace(answer, tensors=self.tensors)
        return EncodedUpdate.of(answer, self.tensors, self.layout)

    def length(self, values: Values) -> int:
        """The length in bytes of a message that holds these and some values."""
        return wire.length(self.tensors, values if self.layout is None else {**values, LAYOUT: self.layout})


def update_length(update: Update) -> int:
    """The length in bytes of the message that an update travels in."""
    return Packed.of(update).length(values_of(update))


def task_length(task: Task, packed: Packed | None = None) -> int:
    """The length in bytes of the message that a task travels in, by default with its tensors as they are."""
    return (packed or Packed(task.tensors)).length({"kind": task.kind, **values_of(task)})


class Channel:
    """Packs the server's messages: with ``compression.down`` a state is compressed, relative to ``start``,
    the state that server and clients can both compute from the recipe.
    """

    def __init__(self, settings: CompressionSettings, start: Mapping[str, Tensor]) -> None:
        self.settings = settings
        self.start = start if settings.down else {}
        self._last: tuple[list[Tensor], Tensors, Packed] = ([], {}, Packed({}))

    def pack_down(self, task: Task) -> Packed:
        """What travels of a task's tensors."""
        if not self._compresses(task):
            return Packed(task.tensors)
        return self._compressed(task.tensors)[1]

    def unpack_down(self, packed: Packed, task: Task) -> Task:
        """A task as the client gets it; ``task`` has what travelled beside its tensors.

        Raises:
            WireError: what came is not what :meth:`pack_down` gives.
        """
        task = replace(task, tensors=packed.tensors)
        if not self._compresses(task):
            return task
        like = laid_out(packed.layout, self.start)
        origin = {name: self._origin(name, tensor) for name, tensor in like.items()}
        return replace(task, tensors=add(origin, decompress(packed.tensors, like, self.settings)))

    def down(self, task: Task) -> tuple[Task, int]:
        """A task as the client gets it, and the length of its message in bytes."""
        if not self._compresses(task):
            return task, task_length(task)
        tensors, packed = self._compressed(task.tensors)
        return replace(task, tensors=tensors), task_length(task, packed)

    def _compresses(self, task: Task) -> bool:
        """Whether a task's tensors are compressed: states are."""
        return self.settings.down and bool(task.tensors) and not task.exact_tensors

    def _compressed(self, tensors: Tensors) -> tuple[Tensors, Packed]:
        """The tensors as they come out of their compressed form, and that; once for a whole cohort."""
        given = list(tensors.values())
        known, result, packed = self._last
        if len(known) == len(given) and all(a is b for a, b in zip(known, given, strict=True)):
            return result, packed
        origin = {name: self._origin(name, tensor) for name, tensor in tensors.items()}
        packed = Packed(compress(subtract(tensors, origin), self.settings), describe(tensors, self.start))
        result = add(origin, decompress(packed.tensors, tensors, self.settings))
        self._last = (given, result, packed)
        return result, packed

    def _origin(self, name: str, tensor: Tensor) -> Tensor:
        """What a tensor is sent relative to: its start, or nothing where it has none of that shape."""
        start = self.start.get(name)
        return start if start is not None and start.shape == tensor.shape else torch.zeros_like(tensor)
