"""Messages of LoRA's variant ``fedask`` beside those of training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..contents import Content
from ..messages import ChangeUpdate, RoundTask


@dataclass(frozen=True, kw_only=True)
class ProjectTask(RoundTask):
    """Project the own products of the round's training on the bases in ``tensors``
    (:class:`~.sketch_exchange.SketchExchange`).
    """

    kind: ClassVar[str] = "project"
    contents: ClassVar[tuple[Content, ...]] = ("updates",)
    exact_tensors: ClassVar[bool] = True
    exchange: ClassVar[int] = 2


@dataclass(frozen=True, kw_only=True)
class ProjectionUpdate(ChangeUpdate):
    """By how much the projections of the client's products differ from those of what it was sent."""
