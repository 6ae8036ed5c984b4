"""Messages of distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..contents import Content
from ..messages import TrainingTask, Whole, message_kinds
from ..tuning.messages import TrainTask, TrainUpdate


@dataclass(frozen=True, kw_only=True)
class DistilTask(TrainingTask):
    """Learn from the predictions in ``tensors``, train on the own examples, and predict public texts.

    Attributes:
        model: The number of the client's base model.
    """

    kind: ClassVar[str] = "distil"
    contents: ClassVar[tuple[Content, ...]] = ("logits", "counts")

    model: Whole

    def training(self) -> TrainTask:
        """The part of it that is training on the own examples."""
        return TrainTask(
            round_number=self.round_number, learning_rate_factor=self.learning_rate_factor, work=self.work
        )


@dataclass(frozen=True, kw_only=True)
class DistilUpdate(TrainUpdate):
    """Predictions of public texts, with the figures of the training before them."""


MESSAGES = message_kinds((DistilTask, DistilUpdate))
