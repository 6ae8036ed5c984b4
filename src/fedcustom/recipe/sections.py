"""Small sections of the recipe, rounds and personalisation, and all sections as its checks read them."""

from __future__ import annotations

from typing import Literal, Protocol

from pydantic import Field

from ..aggregation.settings import AggregationSettings
from ..core.settings import Settings
from ..data.settings import ClientSettings, DataSettings, PublicSettings
from ..evaluation.settings import EvaluationSettings
from ..methods.settings import MethodSettingsBase
from ..models.settings import ModelSettings
from ..privacy.secure_sum.settings import SecureSumSettings
from ..privacy.settings import PrivacySettings
from ..simulation.settings import AttackSettings, NoiseSettings, ParticipationSettings
from ..training.settings import TrainingSettings
from ..transport.workers.settings import WorkerSettings
from ..updates.settings import CompressionSettings

FEDERATED_ONLY = ("attack", "compression", "participation", "personalisation", "privacy", "secure_sum")
"""Sections that a baseline leaves at their defaults."""

MOST_BY_DEFAULT = 50
"""Clients of a round at most, where the recipe does not say how many take part."""


class RoundSettings(Settings):
    """How many rounds, and who takes part in each."""

    count: int = Field(20, ge=1, le=1_000_000, description="Number of rounds")
    clients_per_round: int | None = Field(
        None,
        ge=1,
        description="Clients drawn for each round; unset: all of them, but 50 where there are more (or "
        "min_clients, if that is more); a run says so before its first round",
    )
    selection: Literal["uniform", "balanced"] | None = Field(
        None,
        description="How a round's clients are drawn. uniform: at random, anew in each round; balanced: once "
        "a head was fitted, in turn, so that a round's labels are nearly everybody's, and each client makes "
        "as many batches an epoch as the mean client; unset: balanced where all clients fit the head by "
        "default and a round has ten of them or more, be it at most half of all or all; else uniform. "
        "Natural clients have balanced cohorts while no more of them are there than fit_head_clients, if set",
    )
    min_clients: int = Field(1, ge=1, description="A round with fewer answers stops the run")
    checkpoint_every: int = Field(1, ge=1, description="Rounds between checkpoints")

    def cohort(self, clients: int | None) -> int:
        """How many of ``clients`` take part in a round; None: of as many as there may be."""
        if self.clients_per_round is not None:
            return self.clients_per_round
        most = max(MOST_BY_DEFAULT, self.min_clients)
        return most if clients is None else min(clients, most)


class PersonalisationSettings(Settings):
    """What makes each client's model its own."""

    keep: list[str] = Field(
        default_factory=list,
        description="Parts that stay with each client: head, or parts of tensors' names such as lora_B",
    )
    finetune_epochs: int = Field(
        0, ge=0, description="Passes over its own data that each client makes after the last round"
    )


class Sections(Protocol):
    """What the checks of a recipe read of it."""

    @property
    def baseline(self) -> Literal["federated", "centralised", "local"]: ...
    @property
    def model(self) -> ModelSettings: ...
    @property
    def data(self) -> DataSettings: ...
    @property
    def clients(self) -> ClientSettings: ...
    @property
    def public(self) -> PublicSettings: ...
    @property
    def method(self) -> MethodSettingsBase: ...
    @property
    def training(self) -> TrainingSettings: ...
    @property
    def aggregation(self) -> AggregationSettings: ...
    @property
    def personalisation(self) -> PersonalisationSettings: ...
    @property
    def rounds(self) -> RoundSettings: ...
    @property
    def evaluation(self) -> EvaluationSettings: ...
    @property
    def participation(self) -> ParticipationSettings: ...
    @property
    def attack(self) -> AttackSettings: ...
    @property
    def noise(self) -> NoiseSettings: ...
    @property
    def compression(self) -> CompressionSettings: ...
    @property
    def privacy(self) -> PrivacySettings | None: ...
    @property
    def secure_sum(self) -> SecureSumSettings | None: ...
    @property
    def workers(self) -> WorkerSettings | None: ...
