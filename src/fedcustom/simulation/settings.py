"""The recipe's sections on what a simulation adds to a federation."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from ..settings import Settings


class AttackSettings(Settings):
    """Hostile clients, to see what a rule withstands. They do their work and then change what they send."""

    kind: Literal["none", "sign_flip", "random"] = Field(
        "none",
        description="sign_flip: minus the own change; random: noise as long as the own change; times scale",
    )
    fraction: float = Field(0.2, gt=0, le=1, description="Share of all clients that are hostile")
    scale: float = Field(10.0, gt=0, description="What the hostile change is multiplied by")


class ParticipationSettings(Settings):
    """Clients that drop out, do only part of their work, or come late."""

    dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of a round's clients that take a task and never answer"
    )
    partial: float = Field(
        0.0, ge=0, le=1, description="Share of a round's clients that stop before their work is done"
    )
    minimum_work: float = Field(
        0.2, gt=0, le=1, description="Least share of its work that such a client does (uniform up to all)"
    )
    buffer: int | None = Field(
        None,
        ge=1,
        description="Buffered asynchronous rounds (FedBuff): merge whenever this many answers have come",
    )
    latency: Literal["constant", "uniform", "exponential", "lognormal"] = Field(
        "exponential", description="Distribution of the time that a client takes, with mean 1 (buffer)"
    )
    spread: float = Field(
        0.5, ge=0, le=3, description="Half width (uniform, at most 1) or sigma of the logarithm (lognormal)"
    )
    staleness_exponent: float = Field(
        0.5, ge=0, description="A change that is s rounds late is multiplied by (1 + s) to the minus this"
    )

    @model_validator(mode="after")
    def _spread_fits(self) -> Self:
        if self.latency == "uniform" and self.spread > 1:
            raise ValueError(f"spread = {self.spread}: at most 1 where latency is uniform")
        return self
