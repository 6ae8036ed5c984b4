"""The recipe's section on differential privacy."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ..core.settings import Settings

Unit = Literal["none", "client", "example"]
NoiseAt = Literal["server", "site", "client", "sum"]
Clip = Annotated[float, Field(gt=0)] | Literal["unit", "adaptive"]


class PrivacySettings(Settings):
    """What the released states reveal of one client, or of one training row: at most (epsilon, delta)."""

    unit: Unit = Field(
        "none",
        description="Whose contribution is hidden: a client's, or a training row's (example); none: no noise",
    )
    noise: NoiseAt | None = Field(
        None,
        description="Where noise is added. server: to the sum of the clients' changes, by a trusted server; "
        "site: in each local step (unit = 'example'); sum: by the clients, each a part, to what is summed "
        "under masks (secure_sum.on), so that the server need not be trusted; client: by each client alone, "
        "enough for itself; unset: server, for examples site",
    )
    epsilon: float | None = Field(
        None, gt=0, le=1000, description="The guarantee's epsilon, to which the noise is calibrated"
    )
    noise_multiplier: float | None = Field(
        None, gt=0, description="Noise over the bound, in place of epsilon, which then follows from it"
    )
    delta: float | None = Field(
        None, gt=0, lt=1, description="The guarantee's delta; at most 1 / (10 units), of the clients or rows"
    )
    participation: Literal["cyclic", "poisson"] = Field(
        "cyclic",
        description="Clients' turns. cyclic: fixed groups, one a round, in a fixed order; poisson: each "
        "client by itself with one probability, drawn by a key of the server's",
    )
    bands: int | None = Field(
        None,
        ge=1,
        description="Rounds over which noise is correlated (cyclic); 1: independent; unset: all between two "
        "turns of a client",
    )
    clip: Clip = Field(
        "unit",
        description="Bound of a client's change, without the head. unit: every change is scaled to norm 1; a "
        "number: longer ones are cut to it; adaptive: to the median of their norms (all clients in each "
        "round, or poisson)",
    )
    clip_head: Clip = Field("unit", description="The same for the change of the head")
    head_share: float = Field(
        0.13, gt=0, lt=1, description="Share of mu squared that the fits of the head get (fit_head_rounds)"
    )
    head_clip: float = Field(
        4.0, gt=0, description="Bound of a client's counts and class sums, of rows of length 1"
    )
    accept_noise: bool | None = Field(
        None,
        description="Whether a client's own noise (noise = 'client') may be longer than 100 times its bound",
    )
    randomness: Literal["secret", "seeded"] = Field(
        "secret",
        description="secret: noise from a key that is deleted at the end; seeded: from the recipe's seed, "
        "for research, without a guarantee",
    )

    @model_validator(mode="after")
    def _says_what_is_promised(self) -> Self:
        if self.unit == "none":
            for key in type(self).model_fields:
                value = getattr(self, key)
                if value != type(self).model_fields[key].default:
                    raise ValueError(f"{key} = {value!r}: has no effect while unit = 'none'; name a unit")
            return self
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("epsilon: exactly one of epsilon and noise_multiplier must be set")
        if self.delta is None:
            raise ValueError("delta: must be set; at most 1 / (10 units)")
        if self.unit == "client" and self.noise == "site":
            raise ValueError(
                "noise = 'site': is for unit = 'example'; allowed for 'client': server, sum, client"
            )
        if self.unit == "example" and self.noise not in (None, "site"):
            raise ValueError(f"noise = {self.noise!r}: allowed for unit = 'example': site")
        if self.participation == "poisson" and (self.bands or 1) > 1:
            raise ValueError(
                f"bands = {self.bands}: noise is correlated with participation = 'cyclic' alone; unset it"
            )
        if self.accept_noise is not None and self.noise != "client":
            raise ValueError(f"accept_noise = {self.accept_noise}: is for noise = 'client'; leave it unset")
        return self

    @property
    def place(self) -> NoiseAt:
        """Where noise is added."""
        return self.noise or ("site" if self.unit == "example" else "server")

    @property
    def is_valid(self) -> bool:
        """Whether the noise is secret, without which nothing is promised."""
        return self.randomness == "secret"
