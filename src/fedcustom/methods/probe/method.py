"""Linear probing (Alain and Bengio 2016): logistic regression on the frozen model's vectors."""

from __future__ import annotations

from ...models.load import Base
from ..tuning.technique import TrainableModel
from ..tuning.whole_model import partly_trained
from .settings import ProbeSettings


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
