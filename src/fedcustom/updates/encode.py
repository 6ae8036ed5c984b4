"""Compression with error feedback as a transform of updates; the codes are :mod:`.compression`'s."""

from __future__ import annotations

from ..core.tensors import Tensors, zeros_like
from ..methods.messages import Task, Update
from ..methods.protocol import Memory
from .compression import compress, compress_with_feedback, decompress
from .layout import describe, laid_out
from .settings import CompressionSettings
from .transform import ClientContext, EncodedUpdate, UpdateContext, UpdateTransform

RESIDUAL = "residual/"
"""Before the name of a tensor in a client's memory: what compression has lost of its changes so far."""


class Compression(UpdateTransform):
    """Compresses a client's changes as the recipe says, and decompresses them at the server.

    With error feedback the client remembers what was lost, and adds it to its next change. Answers that must
    be exact, and those without tensors, travel as they are.
    """

    changes_bytes = True

    def __init__(self, settings: CompressionSettings) -> None:
        self.settings = settings
        self.name = f"compression.kind = {settings.kind!r}"

    def on_client(self, update: Update, context: ClientContext) -> Update:
        """The update's tensors as codes, and their layout."""
        if not _compresses(update, context.task):
            return update
        if self.settings.error_feedback:
            codes = self._with_feedback(update.tensors, context.memory)
        else:
            codes = compress(update.tensors, self.settings)
        layout = describe(update.tensors, context.task.tensors)
        return EncodedUpdate.of(update, codes, layout)

    def on_server(self, update: Update, context: UpdateContext) -> Update:
        """The update that the codes stand for, up to what the kind of compression loses.

        Raises:
            WireError: what came is not what :meth:`on_client` gives.
        """
        if not _compresses(update, context.task):
            return update
        encoded = (
            update if isinstance(update, EncodedUpdate) else EncodedUpdate.of(update, update.tensors, None)
        )
        like = laid_out(encoded.layout, context.task.tensors)
        return encoded.decoded(decompress(encoded.tensors, like, self.settings))

    def _with_feedback(self, change: Tensors, memory: Memory) -> Tensors:
        """The codes of a change and of what was lost before, which the memory holds."""
        residual = zeros_like({name: tensor.float() for name, tensor in change.items()}) | {
            name: memory.tensors[RESIDUAL + name] for name in change if RESIDUAL + name in memory.tensors
        }
        codes, residual = compress_with_feedback(change, residual, self.settings)
        memory.tensors = memory.tensors | {RESIDUAL + name: t for name, t in residual.items()}
        return codes


def _compresses(update: Update, task: Task) -> bool:
    return bool(update.tensors) and not task.exact_answer
