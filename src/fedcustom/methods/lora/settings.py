"""The recipe's section for LoRA and its federated variants."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from ...models.size_class import Rates
from ..registry import register
from ..settings import UpperLayersSettings

Variant = Literal[
    "fedit",
    "ffa",
    "flora",
    "fedex",
    "rolora",
    "fedsa",
    "flexlora",
    "hetlora",
    "fedsb",
    "fedsvd",
    "fedask",
]

MIXED_RANKS = ("flora", "flexlora", "hetlora")
"""Variants in which clients may have different ranks."""

OWN_RULE = ("flora", "fedex", "flexlora", "hetlora", "fedask")
"""Variants that merge what the factors make together, by a rule of their own."""

CHANGES_BASE = ("flora", "fedex")
"""Variants that change the base model's matrices."""

OVERSAMPLING = 8
"""Columns of a sketch beyond the rank, by default (Halko et al. 2011 recommend 5 or 10)."""

WITH_DORA = ("fedit", "ffa", "rolora", "fedsa")
"""Variants that average what was trained as it is, and claim nothing about the merged weight."""


@register(".method:Lora", title="LoRA", symbol="square", colours=("#d55e00", "#f08a3c"), order=20)
class LoraSettings(UpperLayersSettings):
    """Low-rank adaptation of chosen matrices."""

    rates: ClassVar[Rates] = Rates(encoder=0.002, decoder=0.03, large=0.0002)

    name: Literal["lora"] = "lora"
    variant: Variant = Field("fedit", description="What travels and how it is merged (docs/lora.md)")
    rank: int = Field(
        8, ge=1, le=4096, description="Rank r of the change; with client_ranks, of the server's"
    )
    client_ranks: list[int] | None = Field(
        None, description="Ranks of the clients, dealt out to them (flora, flexlora, hetlora); unset: rank"
    )
    client_rank_shares: list[float] | None = Field(
        None, description="Share of clients with each of client_ranks; unset: equal shares"
    )
    oversampling: int | None = Field(
        None,
        ge=0,
        le=4096,
        description="Columns of a round's sketches beyond rank (fedask): the more, the nearer to the best "
        f"approximation; unset: {OVERSAMPLING}",
    )
    private_rank: int = Field(
        0, ge=0, le=4096, description="Rank of a second adapter of each client's own, never sent (fedit)"
    )
    alpha: float = Field(16.0, gt=0, description="The change is scaled by alpha / rank")
    rank_stabilised: bool = Field(False, description="rsLoRA: scale by alpha / sqrt(rank) instead")
    dora: bool = Field(
        False, description="DoRA: train the length of each row apart (fedit, ffa, rolora, fedsa)"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input while training")
    target_modules: list[str] | None = Field(
        None,
        description="Matrices to adapt, by name endings; unset: PEFT's choice; ['all-linear']: all",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        ranks, shares = self.client_ranks, self.client_rank_shares
        if ranks is not None:
            if self.variant not in MIXED_RANKS:
                raise ValueError(
                    f"client_ranks = {ranks}: variant {self.variant!r} needs one rank for all; "
                    f"allowed in {', '.join(MIXED_RANKS)}"
                )
            if not ranks or min(ranks) < 1 or max(ranks) > self.rank:
                raise ValueError(f"client_ranks = {ranks}: each must be from 1 to rank = {self.rank}")
        if shares is not None and (
            ranks is None or len(shares) != len(ranks) or min(shares) < 0 or sum(shares) <= 0
        ):
            raise ValueError(
                f"client_rank_shares = {shares}: must be one number of at least 0 for each of client_ranks"
            )
        if self.oversampling is not None and self.variant != "fedask":
            raise ValueError(f"oversampling = {self.oversampling}: needs variant 'fedask'")
        if self.private_rank and (self.variant != "fedit" or self.dora):
            raise ValueError(f"private_rank = {self.private_rank}: needs variant 'fedit' without dora")
        if self.dora and self.variant not in WITH_DORA:
            raise ValueError(
                f"dora = true: DoRA's weight is not linear in B A, so what variant {self.variant!r} merges "
                f"would not be the merged weight; allowed in {', '.join(WITH_DORA)}"
            )
        return self

    def scale(self, rank: int) -> float:
        """What B A is multiplied by at a rank: alpha / r, or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023)."""
        return self.alpha / (rank**0.5 if self.rank_stabilised else rank)

    @property
    def columns_beyond_rank(self) -> int:
        """How many columns a sketch has beyond ``rank``."""
        return OVERSAMPLING if self.oversampling is None else self.oversampling

    @property
    def needs_single_updates(self) -> str | None:
        """Variants with a rule of their own, but for the one whose rule only needs sums."""
        return None if self.variant == "fedask" else super().needs_single_updates

    @property
    def unbounded(self) -> str | None:
        """The variant of whose answers none has the bound of a change: the product of two factors is not
        linear in them.
        """
        return self._named if self.variant == "fedask" else super().unbounded

    @property
    def replaces_rule(self) -> str | None:
        """Variants that merge products of factors, and send their own form of the result."""
        return self._named if self.variant in OWN_RULE else None

    @property
    def needs_same_state(self) -> str | None:
        """The same variants, and the one that trains the two factors in turn."""
        return self._named if self.variant in (*OWN_RULE, "rolora") else None

    @property
    def unsliced(self) -> str | None:
        """DoRA, whose weight is made anew of all its parts; and dropout."""
        if self.dropout:
            return f"method.dropout = {self.dropout}"
        return "method.dora = true" if self.dora else None

    @property
    def turns_tensors(self) -> str | None:
        """The variant that factors the change anew in each round."""
        return self._named if self.variant == "fedsvd" else None

    @property
    def changes_base(self) -> str | None:
        """Variants that add what the factors cannot hold to the base's matrices, and export them merged."""
        return self._named if self.variant in CHANGES_BASE else None

    @property
    def trains_every_round(self) -> str | None:
        """The variant that trains the two factors in turn."""
        return self._named if self.variant == "rolora" else None

    @property
    def personal(self) -> bool:
        """Whether clients keep a factor, an adapter or a rank to themselves."""
        return self.variant == "fedsa" or bool(self.client_ranks) or self.private_rank > 0

    @property
    def _named(self) -> str:
        return f"method.variant = {self.variant!r}"
