"""What the settings of every method that trains tensors say besides their fields."""

from __future__ import annotations

from typing import ClassVar

from ..settings import Settings


class TuningSettings(Settings):
    """A method's section of the recipe; ``default_learning_rate`` is used where the recipe sets none."""

    default_learning_rate: ClassVar[float]
