"""The recipe's section for knowledge distillation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ...aggregation.settings import AggregationSettings
from ...models.size_class import ModelKind
from ...training.settings import TrainingSettings
from ..contents import Content
from ..full.settings import FullSettings
from ..lora.settings import LoraSettings
from ..registry import register
from ..settings import MethodSettingsBase, TuningSettings

Tuning = Literal["full", "lora"]
Rule = Literal["mean", "logits", "sharpened", "power", "confidence", "entropy"]

MEANINGLESS = {
    "compression": "what travels is packed by method.bits and method.top_k",
    "attack": "its changes of tensors are not defined for packed probabilities",
    "personalisation": "every client has a model of its own already",
}
"""Sections that distillation has no use for, and why."""


@register(".method:Distillation", symbol="x", colours=("#8a5a2b", "#c99a6b"), order=90)
class DistillationSettings(MethodSettingsBase):
    """Knowledge distillation: models stay where they are; what they say of public texts travels."""

    sends_weights: ClassVar[bool] = False
    sends_predictions: ClassVar[bool] = True

    name: Literal["distillation"] = "distillation"
    direction: Literal["up", "down", "both"] = Field(
        "up",
        description="Who learns from the others' soft labels: the server's model (up: FedDF), the clients' "
        "(down: FedMD), or both (DS-FL, FedMKT)",
    )
    client_models: list[str] | None = Field(
        None, description="Clients' base models, given to them in turn; unset: model.base for all"
    )
    client_method: Tuning = Field("full", description="How clients train their own models")
    server_method: Tuning = Field("full", description="How the server trains its model")
    lora_rank: int = Field(8, ge=1, le=4096, description="Rank of LoRA, where client or server use it")
    ensemble: Rule = Field(
        "mean",
        description="How soft labels become one: mean of probabilities, mean of logits (FedDF), sharpened "
        "mean (DS-FL), power mean (SCARLET), weighted by confidence or by entropy",
    )
    sharpening_temperature: float = Field(
        0.1, gt=0, le=100, description="Temperature of the sharpened mean: the smaller, the sharper"
    )
    sharpening_exponent: float = Field(
        1.5, gt=0, le=100, description="Exponent of the power mean: the larger, the sharper"
    )
    temperature: float = Field(
        1.0, gt=0, le=100, description="Temperature of teachers' and students' probabilities"
    )
    samples_per_round: int | None = Field(
        None, ge=1, description="Public texts that are asked about in a round, drawn by the seed; unset: all"
    )
    cache_duration: int = Field(
        0,
        ge=0,
        description="Rounds for which a public text's soft label is kept before clients are asked again "
        "(SCARLET); 0: none",
    )
    top_k: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="How many of a prediction's largest probabilities travel; the rest of the mass is one "
        "number; unset: all (generation needs one)",
    )
    bits: Literal[4, 8, 16] = Field(8, description="Bits of a probability that travels")
    server_epochs: int = Field(1, ge=1, description="Passes of the server over a round's public texts")
    client_epochs: int = Field(
        1, ge=1, description="Passes of a client over the public texts before it trains on its own"
    )
    server_learning_rate: float | None = Field(
        None, gt=0, description="The server's learning rate; unset: the default of server_method"
    )
    distil_batch_size: int = Field(16, ge=1, description="Public texts a step of distillation")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.client_models is not None and not all([self.client_models, *self.client_models]):
            raise ValueError(f"client_models = {self.client_models}: name one at least, and none empty")
        return self

    def needed_contents(self, training: TrainingSettings, task: str) -> dict[Content, str]:
        """Predictions of public texts."""
        name = f"method.name = {self.name!r}"
        return {"counts": name, "logits": name}

    def default_learning_rate(self, kind: ModelKind) -> float:
        """The clients' learning rate where the recipe sets none."""
        return self.tuning(self.client_method).default_learning_rate(kind)

    @property
    def has_server_model(self) -> bool:
        """Whether the server has a model."""
        return self.direction != "down"

    @property
    def is_whole(self) -> bool:
        """Whether the server's model is of use without the clients'."""
        return self.has_server_model

    @property
    def changes_base(self) -> str | None:
        """Where clients or the server train all of their models."""
        if self.client_method == "full":
            return "method.client_method = 'full'"
        return "method.server_method = 'full'" if self.server_method == "full" else None

    @property
    def named_models(self) -> tuple[str, ...]:
        """The clients' own base models."""
        return tuple(self.client_models or ())

    def tuning(self, method: Tuning) -> TuningSettings:
        """The settings of the method by which clients or server train their models."""
        if method == "full":
            return FullSettings()
        return LoraSettings(rank=self.lora_rank, alpha=2.0 * self.lora_rank)

    def check_sections(self, baseline: str, sections: Mapping[str, Any]) -> None:
        """Refuse what has no meaning for distillation."""
        super().check_sections(baseline, sections)
        if baseline == "centralised":
            raise ValueError(
                "baseline = 'centralised': one client has nobody to learn from; use method.name = "
                f"{self.client_method!r} for it"
            )
        for name, reason in MEANINGLESS.items():
            if sections[name] != type(sections[name])():
                raise ValueError(f"[{name}]: not with method.name = 'distillation': {reason}")
        aggregation = sections["aggregation"]
        for key, field in AggregationSettings.model_fields.items():
            if key != "weighting" and getattr(aggregation, key) != field.default:
                raise ValueError(
                    f"aggregation.{key} = {getattr(aggregation, key)!r}: distillation merges predictions, "
                    "not weights; allowed: weighting (and see method.ensemble)"
                )
        if sections["training"].proximal:
            raise ValueError("training.proximal: distillation has no global weights to stay close to")
        if sections["training"].gradient_checkpointing:
            raise ValueError(
                "training.gradient_checkpointing: distillation keeps all activations; leave it off"
            )
        for key in ("freeze_head_rounds", "fit_head_rounds"):
            if getattr(sections["training"], key):
                raise ValueError(f"training.{key}: distillation merges no heads")
        public = sections["public"]
        if baseline == "federated" and public.source is None and not public.fraction:
            raise ValueError(
                "method.name = 'distillation': needs public texts; set public.source or public.fraction"
            )
        if sections["data"].task == "generation":
            self._check_generation()

    def _check_generation(self) -> None:
        """What is defined for language models, whose clients have vocabularies of their own."""
        if self.top_k is None:
            raise ValueError("method.top_k: unset; generation needs it, or whole vocabularies would travel")
        if self.direction == "down":
            raise ValueError(
                "method.direction = 'down': for generation the server's model is the common teacher; "
                "allowed: up, both"
            )
        for key in ("ensemble", "cache_duration", "temperature"):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"method.{key} = {getattr(self, key)!r}: is defined for classification; for generation "
                    "the best teacher of each text is chosen, in every round"
                )
