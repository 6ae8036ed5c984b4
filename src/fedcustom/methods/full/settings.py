"""The recipe's section for full fine-tuning."""

from __future__ import annotations

from typing import ClassVar, Literal

from ...models.size_class import Rates
from ..registry import register
from ..settings import TuningSettings


@register(
    ".method:Full", title="full fine-tuning", symbol="triangle-up", colours=("#6b7280", "#a4abb6"), order=40
)
class FullSettings(TuningSettings):
    """Full fine-tuning: every weight is trained."""

    sends_whole_model: ClassVar[bool] = True
    no_first_layer: ClassVar[str] = "every weight is trained"
    rates: ClassVar[Rates] = Rates(encoder=0.0001, decoder=0.003, large=2e-05)

    name: Literal["full"] = "full"

    @property
    def unsliced(self) -> str:
        """All layers are trained; a copy of them for each row would not fit into memory."""
        return "method.name = 'full'"

    @property
    def changes_base(self) -> str:
        """Every weight is trained."""
        return "method.name = 'full'"
