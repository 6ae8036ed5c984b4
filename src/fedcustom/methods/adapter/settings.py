"""The recipe's section for bottleneck adapters."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ...models.size_class import Rates
from ..registry import register
from ..settings import OptionalUpperLayersSettings


@register(".method:Adapter", symbol="triangle-down", colours=("#b5548f", "#e08cc0"), order=50)
class AdapterSettings(OptionalUpperLayersSettings):
    """Bottleneck adapters beside every feed-forward network."""

    rates: ClassVar[Rates] = Rates(encoder=0.002, decoder=0.002, large=0.0003)

    name: Literal["adapter"] = "adapter"
    width: int = Field(48, ge=1, le=65536, description="Hidden units of the adapter beside each network")

    @property
    def has_hidden_units(self) -> bool:
        """An adapter is nothing else."""
        return True
