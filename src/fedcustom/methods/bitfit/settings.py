"""The recipe's section for BitFit."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ...models.size_class import Rates
from ..registry import register
from ..settings import UpperLayersSettings


@register(".method:BitFit", title="BitFit", symbol="star", colours=("#a67c00", "#dfb83c"), order=70)
class BitFitSettings(UpperLayersSettings):
    """Bias vectors, and normalisation scales if asked for."""

    rates: ClassVar[Rates] = Rates(encoder=0.005, decoder=0.005, large=0.001)

    name: Literal["bitfit"] = "bitfit"
    norms: bool = Field(False, description="Train the scales of normalisation layers as well")
