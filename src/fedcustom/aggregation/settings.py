"""The recipe's section on aggregation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self, get_args

from pydantic import Field, model_validator

from ..core import plugins
from ..core.settings import Settings

BuiltInRule = Literal[
    "mean",
    "fednova",
    "median",
    "trimmed_mean",
    "krum",
    "multi_krum",
    "geometric_median",
    "norm_bounding",
    "centred_clipping",
    "fltrust",
]
OFFERED_RULES = plugins.offered(plugins.AGGREGATION, get_args(BuiltInRule))
"""Rules of other packages by name (:func:`~.combine.offered_rule`), of which none is imported yet."""

if TYPE_CHECKING:
    Rule = str
else:
    Rule = Literal[(*get_args(BuiltInRule), *OFFERED_RULES)]

ServerOptimizer = Literal["fedavg", "fedavgm", "nesterov", "fedadagrad", "fedadam", "fedyogi"]


class AggregationSettings(Settings):
    """How updates become the next global state."""

    rule: Rule = Field(
        "mean",
        description="How the clients' changes become one; all but mean and fednova withstand hostile clients",
    )
    weighting: Literal["examples", "uniform"] = Field(
        "examples",
        description="A client's weight: its number of training examples, or one (mean, fednova)",
    )
    byzantine_fraction: float = Field(
        0.2,
        ge=0,
        lt=0.5,
        description="Share of hostile clients to withstand (trimmed_mean, krum, multi_krum)",
    )
    bound: float | None = Field(
        None,
        gt=0,
        description="Largest norm of a change (norm_bounding, centred_clipping); unset: the cohort's median",
    )
    max_norm: float | None = Field(
        None, gt=0, description="Largest norm of a client's change that is merged at all; unset: 1e6"
    )
    max_norm_ratio: float | None = Field(
        None,
        gt=1,
        description="A client's change is left out if its norm is so many times the median of clients' "
        "newest changes (with fewer than three of them: that of the state); unset: 100",
    )
    root_examples: int = Field(
        100, ge=1, description="Development examples on which the server trains for itself (fltrust)"
    )
    correction: Literal["none", "scaffold", "feddyn"] = Field(
        "none", description="Correction of client drift, with a memory at each client; scaffold needs sgd"
    )
    feddyn_alpha: float = Field(0.01, gt=0, description="Strength of FedDyn's regulariser")
    server_optimizer: ServerOptimizer = Field(
        "fedavg", description="How the server follows the combined change; fedavg takes it as it is"
    )
    server_learning_rate: float | None = Field(
        None,
        gt=0,
        description="Step along the change; unset: 1 (fedavg, fedavgm), 0.7 (nesterov), 0.01 (others)",
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="Server momentum (all but fedavg)")
    second_momentum: float = Field(
        0.99, ge=0, lt=1, description="Decay of the second moment (fedadam, fedyogi)"
    )
    adaptivity: float = Field(
        1e-3, gt=0, description="tau of the adaptive optimisers: the larger, the less they adapt"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.correction == "feddyn" and self.server_optimizer != "fedavg":
            raise ValueError(
                f"server_optimizer = {self.server_optimizer!r}: feddyn has a server step of its own; "
                "use 'fedavg'"
            )
        return self

    @property
    def needs_individual_updates(self) -> bool:
        """Whether the rule looks at each client's own change, so that it cannot be given their sum: all but
        the mean, FedNova because it divides every change by its client's number of steps.
        """
        return self.rule != "mean"
