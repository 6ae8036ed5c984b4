"""The list of a run's transforms: put together in its order, and applied."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.errors import RecipeError
from ..methods.messages import Update
from .encode import Compression
from .settings import CompressionSettings
from .transform import ClientContext, JointTransform, ServerTransform, UpdateContext, UpdateTransform

Transforms = tuple[UpdateTransform, ...]


def update_transforms(
    compression: CompressionSettings,
    attack: Sequence[UpdateTransform] = (),
    own: Sequence[UpdateTransform] = (),
) -> Transforms:
    """A run's transforms in the order that :mod:`.transform` states: the simulated attack, the caller's
    ``own``, and compression where the recipe asks for it.

    Raises:
        RecipeError: one that decides the bytes would not be the last, or one of several clients at once not
            the first.
    """
    last = [Compression(compression)] if compression.kind != "none" else []
    transforms = (*attack, *own, *last)
    for transform in transforms[:-1]:
        if transform.changes_bytes:
            raise RecipeError(f"{transform.name}: decides the bytes, so no other transform can follow it")
    for transform in transforms[1:]:
        if isinstance(transform, JointTransform):
            raise RecipeError(f"{transform.name}: acts before each client is by itself, so it must be first")
    return transforms


def on_client(transforms: Sequence[UpdateTransform], update: Update, context: ClientContext) -> Update:
    """What travels of an update that a client's method made: through all transforms, first to last. An answer
    without tensors, or one that must be exact, travels as it is.
    """
    if context.task.exact_answer or not update.tensors:
        return update
    for transform in transforms:
        update = transform.on_client(update, context)
    return update


def on_server(transforms: Sequence[UpdateTransform], update: Update, context: UpdateContext) -> Update:
    """An update as the server gets it from what travelled: through those that act there, last to first.

    Raises:
        WireError: what came is no update.
    """
    for transform in reversed(transforms):
        if isinstance(transform, ServerTransform):
            update = transform.on_server(update, context)
    return update
