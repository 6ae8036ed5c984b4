"""What the settings of every method that trains tensors say besides their fields."""

from __future__ import annotations

from typing import ClassVar

from ..settings import Settings


class TuningSettings(Settings):
    """A method's section of the recipe.

    ``default_learning_rate`` is used where the recipe sets none. ``pads_decoders_left`` says that a decoder
    which classifies must have its padding on the left, since the last position is read off without looking
    for padding.
    """

    default_learning_rate: ClassVar[float]
    pads_decoders_left: ClassVar[bool] = False
