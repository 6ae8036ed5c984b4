"""The recipe's section for prompt tuning."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ...models.size_class import ModelKind, Rates
from ..registry import register
from ..settings import TuningSettings


@register(".method:SoftPrompt", symbol="diamond", colours=("#008f68", "#3cc79c"), order=30)
class SoftPromptSettings(TuningSettings):
    """Learnt vectors in front of the embedded input."""

    rates: ClassVar[Rates] = Rates(encoder=0.03, decoder=0.3, large=0.3)
    network_rates: ClassVar[Rates] = Rates(encoder=0.003, decoder=0.003, large=0.003)

    no_first_layer: ClassVar[str] = "learnt vectors change what flows from the first layer on"

    name: Literal["soft_prompt"] = "soft_prompt"
    length: int = Field(16, ge=1, le=100_000, description="Number of learnt vectors")
    init: Literal["random", "vocabulary", "text"] = Field(
        "vocabulary",
        description="random: normal; vocabulary: embeddings of random tokens; text: those of init_text",
    )
    init_text: str = Field(
        "Read the text and answer.", min_length=1, description="Text for init = text, repeated to length"
    )
    encoder: Literal["none", "mlp", "lstm"] = Field(
        "none",
        description="mlp, lstm: train through such a network at the client, as in p-tuning; it is never sent",
    )
    encoder_width: int = Field(128, ge=1, le=65536, description="Hidden width of that network")

    def default_learning_rate(self, kind: ModelKind) -> float:
        """The learning rate for a kind of model where the recipe sets none: a network's is lower than that of
        vectors that are trained themselves.
        """
        return (self.rates if self.encoder == "none" else self.network_rates).of(kind)

    @property
    def unsliced(self) -> str | None:
        """A network that all rows train together."""
        return None if self.encoder == "none" else f"method.encoder = {self.encoder!r}"

    @property
    def context_tokens(self) -> int:
        """Its length: an input starts after it."""
        return self.length
