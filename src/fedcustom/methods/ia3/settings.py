"""The recipe's section for (IA)^3."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ...models.size_class import Rates
from ..registry import register
from ..settings import UpperLayersSettings


@register(".method:Ia3", title="IA3", symbol="pentagon", colours=("#2f9fd0", "#8ed2f2"), order=60)
class Ia3Settings(UpperLayersSettings):
    """Learnt vectors that rescale keys, values and hidden units."""

    rates: ClassVar[Rates] = Rates(encoder=0.01, decoder=0.01, large=0.003)

    name: Literal["ia3"] = "ia3"
    target_modules: list[str] | None = Field(
        None,
        description="Matrices to rescale, by name endings; unset: PEFT's choice, or keys, values and the "
        "feed-forward networks' last matrices",
    )
    feedforward_modules: list[str] | None = Field(
        None, description="Those of target_modules whose inputs are rescaled, not their outputs"
    )
