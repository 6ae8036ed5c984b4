"""Linear probing (Alain and Bengio 2016): logistic regression on the frozen model's vectors."""

from __future__ import annotations

from typing import ClassVar, Literal

from ...models.kind import Rates
from ...models.load import Base
from ..settings import TuningSettings
from ..tuning.technique import TrainableModel
from ..tuning.whole_model import partly_trained


class ProbeSettings(TuningSettings):
    """Logistic regression on the frozen model's vectors: what every classifier has to beat."""

    tasks: ClassVar[tuple[str, ...]] = ("classification",)
    rates: ClassVar[Rates] = Rates(encoder=0.001, decoder=0.001, large=0.001)
    only_fits: ClassVar[bool] = True

    name: Literal["probe"] = "probe"


class Probe:
    """Nothing of the model is trained but the head, and that is fitted, in one round
    (:class:`~..tuning.head_fit.HeadFit`): across clients, from sums and gradients that add up, to
    what all examples in one place give. The customised model is exported whole.
    """

    def __init__(self, settings: ProbeSettings) -> None:
        self.settings = settings

    def attach(self, base: Base, seed: int) -> TrainableModel:
        """Freeze everything but the head."""
        return partly_trained(base, seed, ())
