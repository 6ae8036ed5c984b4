"""The recipe's section for prefix-tuning."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ...models.size_class import ModelKind, Rates
from ..registry import register
from ..settings import OptionalUpperLayersSettings

TEXT = (
    "The following is a text from our work. Read it with care, think about what it says and what it is for, "
    "and then give the answer that a person who knows this field well would give."
)

MEMORY_ONLY = ("slots", "feed_forward_slots", "keys", "linear", "query_shifts")
KV_ONLY = (
    "reparametrise", "compression", "public_text", "distil_steps",
    "distil_learning_rate", "layers_sent",
)  # fmt: skip
"""Settings that one kind alone reads."""

SAYS_KV = frozenset({"init", "reparametrise", "public_text", "layers_sent"})
"""Settings that imply key-value pairs where a recipe does not say which kind."""


@register(".method:Prefix", symbol="circle", colours=("#0060a8", "#5aa9ec"), order=10)
class PrefixSettings(OptionalUpperLayersSettings):
    """Learnt keys and values in every layer: beside attention and the feed-forward network, or in front of
    the input's own.
    """

    rates: ClassVar[Rates] = Rates(encoder=0.015, decoder=0.03, large=0.002)
    kv_rates: ClassVar[Rates] = Rates(encoder=0.01, decoder=0.3, large=0.01)

    name: Literal["prefix"] = "prefix"
    kind: Literal["memory", "kv"] = Field(
        "memory",
        description="memory: slots outside of attention's softmax, and beside the feed-forward networks "
        "(docs/prefix.md); kv: key-value pairs in front of the input's (Li and Liang 2021); unset: kv where "
        "init, reparametrise, public_text or layers_sent is set",
    )
    length: int = Field(
        16,
        ge=1,
        le=100_000,
        description="Number of key-value pairs in each layer and head; memory: slots that are not set have "
        "as many numbers in all (with first_layer: as those of the layers that are trained)",
    )
    slots: int | None = Field(
        None, ge=0, le=100_000, description="Slots beside each attention block (memory); unset: by length"
    )
    feed_forward_slots: int | None = Field(
        None,
        ge=0,
        le=100_000,
        description="Slots beside each feed-forward network (memory); unset: likewise",
    )
    keys: Literal["trained", "frozen"] = Field(
        "trained",
        description="frozen: keys stay as the seed draws them, and only values are trained and sent (memory)",
    )
    linear: bool = Field(
        False, description="Also add a matrix times each head's normalised query (memory; Katharopoulos 2020)"
    )
    query_shifts: bool | None = Field(
        None,
        description="Slots beside attention also shift the query that they read, which changes what "
        "attention looks at (memory); unset: in decoders and not in encoders",
    )
    init: Literal["auto", "random", "zero", "text"] = Field(
        "auto",
        description="kv: random: normal; zero: nearly no effect at first; text: keys and values of "
        "init_text; auto: text. memory: random (auto): normal keys; text: keys of init_text's tokens, beside "
        "attention; values are zero",
    )
    init_text: str = Field(
        TEXT, min_length=1, description="Text for init = text, repeated to length or to the number of slots"
    )
    reparametrise: bool = Field(
        False, description="Train through a small network at the client, as in the paper; it is never sent"
    )
    reparametrise_width: int = Field(128, ge=1, le=65536, description="Hidden width of that network")
    merging: Literal["mean", "matched", "stacked", "alternate"] = Field(
        "mean",
        description="mean: of keys and of values (exact with frozen keys); matched: of slots put into one "
        "order; stacked: all clients' slots, brought back to their number; alternate: keys are trained in "
        "odd rounds and values in even ones (memory). docs/prefix_rules.md",
    )
    compression: Literal["barycentre", "cluster", "distil"] = Field(
        "barycentre",
        description="kv: how stacked slots are brought back to length; distil goes on from the barycentre on "
        "public_text",
    )
    public_text: str | None = Field(
        None,
        description="Text file of the server's, one unlabelled text a line, of which 128 tokens are read "
        "(compression = distil)",
    )
    distil_steps: int = Field(50, ge=1, le=100_000, description="Steps of the distillation in each round")
    distil_learning_rate: float = Field(0.01, gt=0, description="Learning rate of the distillation")
    layers_sent: int | None = Field(
        None,
        ge=1,
        description="Layers of the prefix that a client sends, those that changed most; unset: all of them",
    )

    @model_validator(mode="before")
    @classmethod
    def _kind_by_settings(cls, values: Any) -> Any:
        """Recipes written before there were memories mean key-value pairs by these settings."""
        if isinstance(values, dict) and "kind" not in values and not SAYS_KV.isdisjoint(values):
            return {**values, "kind": "kv"}
        return values

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        defaults = type(self).model_fields
        for key in MEMORY_ONLY if self.kind == "kv" else KV_ONLY:
            if getattr(self, key) != defaults[key].default:
                raise ValueError(f"{key} = {getattr(self, key)!r}: has no effect with kind = {self.kind!r}")
        if self.first_layer and self.kind == "kv":
            raise ValueError(
                f"first_layer = {self.first_layer}: has no exact form with kind = 'kv', since PEFT puts "
                "pairs into every layer's softmax, where pairs of zeros take weight too; leave it at 0, or "
                "use kind = 'memory'"
            )
        if self.kind == "memory" and self.init == "zero":
            raise ValueError("init = 'zero': keys of zero are never trained; memory allows random and text")
        if not self.init_text.strip():
            raise ValueError("init_text: is blank; give a text with at least one word")
        from_text = self.init == "text" or (self.init == "auto" and self.kind == "kv")
        if self.init_text != TEXT and not from_text:
            raise ValueError(f"init_text: has no effect with init = {self.init!r}")
        if self.slots == 0 and self.query_shifts:
            raise ValueError("query_shifts = true: has no effect with slots = 0")
        if self.slots == 0 and self.kind == "memory" and self.init == "text":
            raise ValueError("init = 'text': has no effect with slots = 0")
        if self.slots == 0 and self.feed_forward_slots == 0 and not self.linear:
            raise ValueError("slots = 0 and feed_forward_slots = 0: leave nothing to train")
        self._check_merging()
        distils = self.merging == "stacked" and self.compression == "distil"
        if distils != (self.public_text is not None):
            raise ValueError(
                "public_text: is needed with merging = 'stacked' and compression = 'distil', and only there"
            )
        fields = self.model_fields_set
        unused = [key for key in ("compression",) if key in fields and self.merging != "stacked"]
        unused += [k for k in ("distil_steps", "distil_learning_rate") if k in fields and not distils]
        changed = [key for key in unused if getattr(self, key) != type(self).model_fields[key].default]
        if changed:
            raise ValueError(f"{changed[0]} = {getattr(self, changed[0])!r}: has no effect here")
        if self.layers_sent is not None and self.merging != "mean":
            raise ValueError(f"layers_sent = {self.layers_sent}: needs merging = 'mean'")
        return self

    def _check_merging(self) -> None:
        """What the rules that merge slots are for."""
        said = f"merging = {self.merging!r}"
        if self.kind == "kv":
            if self.merging == "alternate":
                raise ValueError(f"{said}: needs kind = 'memory'; kv allows mean, matched, stacked")
        elif self.merging != "mean":
            if self.keys == "frozen":
                raise ValueError(f"{said}: with keys = 'frozen' the mean is exact; leave merging at 'mean'")
            if self.slots == 0 and self.feed_forward_slots == 0:
                raise ValueError(
                    f"{said}: without slots there is nothing but the linear memory, whose mean is exact; "
                    "leave merging at 'mean'"
                )

    @property
    def has_hidden_units(self) -> bool:
        """With slots, and not with key-value pairs."""
        return self.kind == "memory"

    @property
    def context_tokens(self) -> int:
        """Its length, with key-value pairs: an input starts after them."""
        return self.length if self.kind == "kv" else 0

    def default_learning_rate(self, kind: ModelKind) -> float:
        """The learning rate for a kind of model where the recipe sets none."""
        return (self.rates if self.kind == "memory" else self.kv_rates).of(kind)

    @property
    def replaces_rule(self) -> str | None:
        """Stacking of memory slots: those that go down next are clusters, in which none of the slots before
        can be told. Matching keeps the order of slots, and key-value pairs that of the prefix before.
        """
        return self._merging_if("stacked")

    @property
    def needs_same_state(self) -> str | None:
        """Stacking of memory slots, and alternation, whose answers to another round change other tensors."""
        return self._merging_if("stacked", "alternate")

    @property
    def needs_single_updates(self) -> str | None:
        """All rules but the mean, and layers that each client chooses."""
        if self.layers_sent is not None:
            return f"method.layers_sent = {self.layers_sent}"
        return None if self.merging == "mean" else f"method.merging = {self.merging!r}"

    @property
    def unsliced(self) -> str | None:
        """A network that all rows train together."""
        return "method.reparametrise = true" if self.reparametrise else None

    @property
    def trains_every_round(self) -> str | None:
        """Alternation."""
        return self._merging_if("alternate")

    @property
    def redraws_tensors(self) -> bool:
        """Whether clients send other layers in each round, or the slots of a new stack."""
        return self.layers_sent is not None or self.replaces_rule is not None

    def _merging_if(self, *variants: str) -> str | None:
        named = self.kind == "memory" and self.merging in variants
        return f"method.merging = {self.merging!r}" if named else None
