"""The recipe's sections on what a simulation adds to a federation."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from ..core.settings import Settings


class AttackSettings(Settings):
    """Hostile clients, to see what a rule withstands: they change what they send, or train on bad data."""

    kind: Literal["none", "sign_flip", "random", "alie", "label_flip", "backdoor"] = Field(
        "none",
        description="sign_flip: minus the own change, times scale; random: noise as long as the own change, "
        "times scale; alie: their mean minus a few deviations; label_flip: train on label C - 1 - c in place "
        "of c; backdoor: train texts with a trigger towards a target",
    )
    fraction: float = Field(0.2, gt=0, le=1, description="Share of all clients that are hostile")
    scale: float = Field(
        10.0, gt=0, description="What the hostile change is multiplied by (sign_flip, random)"
    )
    boost: float = Field(
        1.0,
        gt=0,
        description="The same for poisoned data (label_flip, backdoor); above 1: model replacement",
    )
    deviations: float | None = Field(
        None, ge=0, description="Standard deviations from the mean (alie); unset: from the numbers of clients"
    )
    trigger: str = Field("cf mn", min_length=1, description="Words put in front of a text (backdoor)")
    target: str | None = Field(
        None, description="Label that a text with the trigger is to get (backdoor); unset: the first"
    )
    poisoned_share: float = Field(
        0.5, gt=0, le=1, description="Share of a hostile client's examples with the trigger (backdoor)"
    )


class NoiseSettings(Settings):
    """Clients whose labels are wrong by mistake: in what they train on, not in what is scored."""

    labels: float = Field(0.0, ge=0, le=1, description="Share of a noisy client's labels that are wrong")
    clients: float = Field(0.3, gt=0, le=1, description="Share of all clients whose labels are noisy")


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
