"""The recipe's section for linear probing."""

from __future__ import annotations

from typing import ClassVar, Literal

from ...models.size_class import Rates
from ..registry import register
from ..settings import TuningSettings


@register(".method:Probe", symbol="bar", colours=("#1f2a44", "#cfd8ea"), order=80)
class ProbeSettings(TuningSettings):
    """Logistic regression on the frozen model's vectors: what every classifier has to beat."""

    tasks: ClassVar[tuple[str, ...]] = ("classification",)
    rates: ClassVar[Rates] = Rates(encoder=0.001, decoder=0.001, large=0.001)
    only_fits: ClassVar[bool] = True
    one_round: ClassVar[bool] = True
    to_beat: ClassVar[bool] = True

    name: Literal["probe"] = "probe"


PROBE: str = ProbeSettings().name
"""Its name, for those who run it beside other methods."""
