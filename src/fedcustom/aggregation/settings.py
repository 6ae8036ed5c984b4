"""The recipe's section on how the server merges updates."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..settings import Settings

Rule = Literal["fedavg", "fedavgm", "fedadagrad", "fedadam", "fedyogi"]


class AggregationSettings(Settings):
    """How updates become the next global state."""

    rule: Rule = Field(
        "fedavg", description="Weighted mean, followed by a server optimiser in all rules but fedavg"
    )
    weighting: Literal["examples", "uniform"] = Field(
        "examples", description="A client's weight: its number of training examples, or one"
    )
    server_learning_rate: float | None = Field(
        None,
        gt=0,
        description="Step along the mean change; unset: 1 (fedavg, fedavgm), 0.01 (adaptive rules)",
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="Server momentum (all rules but fedavg)")
    second_momentum: float = Field(
        0.99, ge=0, lt=1, description="Decay of the second moment (fedadam, fedyogi)"
    )
    adaptivity: float = Field(
        1e-3, gt=0, description="tau of the adaptive rules: the larger, the less they adapt"
    )
