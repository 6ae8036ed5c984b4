"""Messages of distillation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ..contents import Content
from ..protocol import INLINE, RoundTask, Whole, Work, message_kinds
from ..tuning.messages import TrainTask, TrainUpdate


@dataclass(frozen=True, kw_only=True)
class DistilTask(RoundTask):
    """Learn from the predictions in ``tensors``, train on the own examples, and predict public texts.

    Attributes:
        learning_rate_factor: What the recipe's learning rates are multiplied by.
        model: The number of the client's base model.
    """

    kind: ClassVar[str] = "distil"
    contents: ClassVar[tuple[Content, ...]] = ("logits", "counts")
    trains: ClassVar[bool] = True

    learning_rate_factor: float = 1.0
    model: Whole
    work: Work = field(default=Work(), metadata={INLINE: True})

    def training(self) -> TrainTask:
        """The part of it that is training on the own examples."""
        return TrainTask(
            round_number=self.round_number, learning_rate_factor=self.learning_rate_factor, work=self.work
        )


@dataclass(frozen=True, kw_only=True)
class DistilUpdate(TrainUpdate):
    """Predictions of public texts, with the figures of the training before them."""


MESSAGES = message_kinds((DistilTask, DistilUpdate))
