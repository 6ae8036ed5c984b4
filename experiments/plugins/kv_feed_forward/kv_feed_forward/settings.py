"""The recipe's section."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from fedcustom.methods.registry import register
from fedcustom.methods.settings import TuningSettings
from fedcustom.models.size_class import Rates


@register("kv_feed_forward.method:KvFeedForward", title="key-value pairs and feed-forward slots")
class KvFeedForwardSettings(TuningSettings):
    """Key-value pairs inside attention's softmax, and slots beside the feed-forward networks."""

    rates: ClassVar[Rates] = Rates(encoder=0.015, decoder=0.03, large=0.002)

    name: Literal["kv_feed_forward"] = "kv_feed_forward"
    length: int = Field(2, ge=1, le=100_000, description="Key-value pairs in each layer and head")
    feed_forward_slots: int = Field(
        13, ge=1, le=100_000, description="Slots beside each feed-forward network"
    )

    @property
    def context_tokens(self) -> int:
        """An input starts after the pairs."""
        return self.length
