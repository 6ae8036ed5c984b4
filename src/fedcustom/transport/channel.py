"""What a message becomes on its way between server and client, and how long it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.errors import WireError
from ..core.tensors import Tensors, add, subtract, zeros_like
from ..methods.protocol import Memory, Task, Update, Values
from ..methods.tuning.head_messages import HEAD_TASKS, POINT
from ..updates.compression import compress, compress_with_feedback, decompress
from ..updates.settings import CompressionSettings
from . import wire

RESIDUAL = "residual/"
LAYOUT = "layout"


Layout = list[int] | dict[str, list[Any]] | None
"""Names, shapes and dtypes of tensors, as far as the receiver does not know them (:func:`describe`)."""

DTYPE_NAMES = {name: dtype for dtype, name in wire.DTYPES.items()}


@dataclass(frozen=True)
class Packed:
    """Tensors as they travel and, where they are compressed, what the receiver must know of their form."""

    tensors: Tensors
    layout: Layout = None

    def length(self, values: Values) -> int:
        """The length in bytes of a message that holds these and some values."""
        return wire.length(self.tensors, values if self.layout is None else {**values, LAYOUT: self.layout})


class Channel:
    """Compresses what travels as the recipe says.

    ``start`` is the state that server and clients can both compute from the recipe: what goes down is
    compressed relative to it.
    """

    def __init__(self, settings: CompressionSettings, start: Mapping[str, Tensor]) -> None:
        self.settings = settings
        self.start = start if settings.down else {}
        self._last: tuple[list[Tensor], Tensors, Packed] = ([], {}, Packed({}))

    # --- at the one end ---

    def pack_down(self, task: Task) -> Packed:
        """What travels of a task's tensors."""
        if not self._compresses_down(task.tensors):
            return Packed(task.tensors)
        return self._compressed(task.tensors)[1]

    def pack_up(self, update: Update, task: Task, memory: Memory) -> Packed:
        """What travels of an update's tensors. With error feedback the client remembers what was lost."""
        if not self._compresses(update.tensors, task):
            return Packed(update.tensors)
        layout = describe(update.tensors, task.tensors)
        if not self.settings.error_feedback:
            return Packed(compress(update.tensors, self.settings), layout)
        residual = zeros_like({n: t.float() for n, t in update.tensors.items()}) | {
            name: memory.tensors[RESIDUAL + name]
            for name in update.tensors
            if RESIDUAL + name in memory.tensors
        }
        packed, residual = compress_with_feedback(update.tensors, residual, self.settings)
        memory.tensors = memory.tensors | {RESIDUAL + name: t for name, t in residual.items()}
        return Packed(packed, layout)

    # --- at the other ---

    def unpack_down(self, packed: Packed) -> Tensors:
        """A task's tensors as the client gets them.

        Raises:
            WireError: what came is not what :meth:`pack_down` gives.
        """
        if not self._compresses_down(packed.tensors):
            return packed.tensors
        like = laid_out(packed.layout, self.start)
        origin = {name: self._origin(name, tensor) for name, tensor in like.items()}
        return add(origin, decompress(packed.tensors, like, self.settings))

    def unpack_up(self, packed: Packed, task: Task) -> Tensors:
        """An update's tensors as the server gets them.

        Raises:
            WireError: what came is not what :meth:`pack_up` gives.
        """
        if not self._compresses(packed.tensors, task):
            return packed.tensors
        return decompress(packed.tensors, laid_out(packed.layout, task.tensors), self.settings)

    # --- both at once ---

    def down(self, task: Task) -> tuple[Task, int]:
        """A task as the client gets it, and the length of its message in bytes."""
        values = {"kind": task.kind, **task.values}
        if not self._compresses_down(task.tensors):
            return task, wire.length(task.tensors, values)
        tensors, packed = self._compressed(task.tensors)
        return replace(task, tensors=tensors), packed.length(values)

    def up(self, update: Update, task: Task, memory: Memory) -> tuple[Update, int]:
        """An update as the server gets it, and the length of its message in bytes."""
        packed = self.pack_up(update, task, memory)
        received = self.unpack_up(packed, task)
        return replace(update, tensors=received), packed.length({"weight": update.weight, **update.values})

    def _compresses_down(self, tensors: Tensors) -> bool:
        """Whether a task is compressed: states are, and a head that is being fitted must be exact."""
        return self.settings.down and self.settings.kind != "none" and bool(tensors) and POINT not in tensors

    def _compresses(self, tensors: Tensors, task: Task) -> bool:
        """Whether an update is compressed: changes of what is trained are, and sums must be exact."""
        return self.settings.kind != "none" and bool(tensors) and task.kind not in HEAD_TASKS

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


def describe(tensors: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> Layout:
    """How the receiver, who has ``known``, is told the names, shapes and dtypes of what was compressed: not
    at all where they are the same, by the places of the names where they are among them, else one by one.
    """
    same = all(n in known and _form(t) == _form(known[n]) for n, t in tensors.items())
    if same and len(tensors) == len(known):
        return None
    if same:
        return [place for place, name in enumerate(sorted(known)) if name in tensors]
    return {name: [*_form(tensor)] for name, tensor in sorted(tensors.items())}


def laid_out(layout: object, known: Mapping[str, Tensor]) -> Tensors:
    """Tensors with the names, shapes and dtypes that :func:`describe` told of; they take no memory.

    Raises:
        WireError: it is not such a description.
    """
    if layout is None:
        return dict(known)
    names = sorted(known)
    if isinstance(layout, list):
        if not all(type(place) is int and 0 <= place < len(names) for place in layout):
            raise WireError("a compressed change names tensors that were not sent")
        return {names[place]: known[names[place]] for place in layout}
    if not isinstance(layout, dict):
        raise WireError("a compressed change does not say what it holds")
    result: Tensors = {}
    for name, form in layout.items():
        dtype = DTYPE_NAMES.get(str(form[0])) if isinstance(form, list) and len(form) == 2 else None
        shape = form[1] if dtype is not None else None
        if dtype is None or not isinstance(shape, list) or len(shape) > 8:
            raise WireError(f"{name}: neither dtype nor shape")
        if not all(type(size) is int and 0 <= size < 2**31 for size in shape):
            raise WireError(f"{name}: no shape: {shape}")
        result[name] = torch.empty(1, dtype=dtype).expand(shape)
    return result


def _form(tensor: Tensor) -> tuple[str, list[int]]:
    return wire.DTYPES[tensor.dtype], list(tensor.shape)
