"""Direct preference optimisation: losses of pairs from the log-likelihoods of their answers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from .settings import TrainingSettings

BETA, LABEL_SMOOTHING = 0.1, 0.0
"""Where a recipe sets none."""


@dataclass(frozen=True)
class DPO:
    """The loss of Rafailov et al. (2023, eq. 7), with the label smoothing of conservative DPO (Mitchell 2023,
    "A note on DPO with noisy preferences & relationship to IPO", eq. 3; TRL's ``label_smoothing`` of the loss
    ``sigmoid``).

    With an answer's log-ratio r = log p - log p_reference, summed over its tokens, the margin
    h = beta (r_chosen - r_rejected) and the smoothing e::

        loss = - (1 - e) log sigmoid(h) - e log sigmoid(-h)

    The unbiased estimate of Chowdhury et al. (2024, "Provably robust DPO"), which divides by 1 - 2 e, is
    another loss.
    """

    beta: float = BETA
    label_smoothing: float = LABEL_SMOOTHING

    @classmethod
    def of(cls, training: TrainingSettings) -> DPO:
        """The loss that a recipe asks for."""
        beta, smoothing = training.beta, training.label_smoothing
        return cls(BETA if beta is None else beta, LABEL_SMOOTHING if smoothing is None else smoothing)

    def margins(self, likelihoods: Tensor, reference: Tensor) -> Tensor:
        """The reward margins h, (pairs,), from log-likelihoods in nats of the chosen and the rejected answer,
        (pairs, 2), of the trained model and of the reference model.
        """
        ratios = likelihoods - reference
        return self.beta * (ratios[:, 0] - ratios[:, 1])

    def losses(self, margins: Tensor) -> Tensor:
        """The loss of each pair, (pairs,)."""
        right, wrong = functional.logsigmoid(margins), functional.logsigmoid(-margins)
        return -(1 - self.label_smoothing) * right - self.label_smoothing * wrong
