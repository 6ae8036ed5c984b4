"""Losses of direct preference optimisation against sums by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fedcustom.training.dpo import DPO
from fedcustom.training.settings import TrainingSettings

LIKELIHOODS = [[-3.0, -7.5], [-12.0, -4.0], [-5.0, -5.0], [-900.0, -2.0]]
REFERENCE = [[-4.0, -6.0], [-11.0, -6.5], [-5.0, -5.0], [-3.0, -4.0]]


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.0), (0.5, 0.2), (0.01, 0.49)])
def test_losses_and_their_slopes(beta: float, smoothing: float) -> None:
    """The slope in the margin h is (1 - e) (sigmoid(h) - 1) + e sigmoid(h) = sigmoid(h) - (1 - e)."""
    dpo = DPO.of(TrainingSettings(beta=beta, label_smoothing=smoothing))
    margins = dpo.margins(torch.tensor(LIKELIHOODS), torch.tensor(REFERENCE)).double().requires_grad_()
    wanted = [
        beta * ((chosen - own) - (rejected - other))
        for (chosen, rejected), (own, other) in zip(LIKELIHOODS, REFERENCE, strict=True)
    ]
    assert margins.tolist() == pytest.approx(wanted, rel=1e-6)
    losses = dpo.losses(margins)
    by_hand = [-(1 - smoothing) * math.log(sigmoid(h)) - smoothing * math.log(sigmoid(-h)) for h in wanted]
    assert losses.tolist() == pytest.approx(by_hand, rel=1e-6)
    (slopes,) = torch.autograd.grad(losses.sum(), margins)
    assert slopes.tolist() == pytest.approx([sigmoid(h) - (1 - smoothing) for h in wanted], abs=1e-6)


def test_a_model_that_is_its_reference_has_the_loss_of_a_coin() -> None:
    same = torch.tensor(LIKELIHOODS, dtype=torch.float64)
    dpo = DPO(label_smoothing=0.25)
    assert dpo.losses(dpo.margins(same, same)).tolist() == [math.log(2)] * 4


def test_defaults() -> None:
    assert DPO.of(TrainingSettings()) == DPO(0.1, 0.0)
