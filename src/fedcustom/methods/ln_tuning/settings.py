"""The recipe's section for LN-tuning."""

from __future__ import annotations

from typing import ClassVar, Literal

from ...models.size_class import Rates
from ..registry import register
from ..settings import UpperLayersSettings


@register(".method:LnTuning", title="LN-tuning", colours=("#7a6f63", "#b8ab9c"), order=75)
class LnTuningSettings(UpperLayersSettings):
    """Scales and shifts of the normalisation layers."""

    rates: ClassVar[Rates] = Rates(encoder=0.005, decoder=0.005, large=0.001)

    name: Literal["ln_tuning"] = "ln_tuning"
