"""Reference model: what the base computes, with the method's tensors out of the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .technique import TrainableModel


class ReferenceModel:
    """The base model as it was loaded, in the place of a second copy of it.

    A method whose first tensors leave what the base computes as it is has these put back meanwhile: for an
    adapter they are few; full fine-tuning keeps all weights a second time, in the processor's memory. Of
    prompts and key-value prefixes the model without them is taken.
    """

    def __init__(self, trainable: TrainableModel) -> None:
        self.trainable = trainable
        self.first = trainable.read() if trainable.base_model is None else {}

    @contextmanager
    def in_place(self) -> Iterator[Any]:
        """The model to call; afterwards the method's model has its tensors again."""
        if self.trainable.base_model is not None:
            yield self.trainable.base_model
            return
        now = self.trainable.read()
        self.trainable.write(self.first)
        try:
            yield self.trainable.model
        finally:
            self.trainable.write(now)
