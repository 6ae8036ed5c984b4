"""The recipe's section on retrieval-augmented generation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ...models.size_class import ModelKind
from ...training.settings import TrainingSettings
from ..contents import Content
from ..registry import register
from ..settings import MethodSettingsBase

Policy = Literal["passages", "scores", "answer"]


CHANGES_ALONE = (("compression", "kind", "none"), ("attack", "kind", "none"))
"""Sections that act on whatever an update holds, and what they must be where that is more than changes."""

UNTRAINED = ("aggregation", "compression", "participation", "attack")
"""Sections that act on training alone."""


@register(".method:Retrieval", symbol="hexagon", colours=("#b3263b", "#f27d8b"), order=100)
class RetrievalSettings(MethodSettingsBase):
    """Each client searches its own documents; the server merges what they find, and may write an answer."""

    with_head: ClassVar[bool] = False
    sends_weights: ClassVar[bool] = False
    tasks: ClassVar[tuple[str, ...]] = ("retrieval",)
    not_for: ClassVar[tuple[str, ...]] = ("personalisation",)

    name: Literal["retrieval"] = "retrieval"
    train: Literal["none", "full", "lora"] = Field(
        "none", description="Fine-tune the encoder on the clients' pairs of question and passage"
    )
    rank: int = Field(8, ge=1, le=4096, description="Rank of that fine-tuning (train = lora)")
    shared_negatives: int = Field(
        0,
        ge=0,
        le=100_000,
        description="In federated training, vectors of this many passages that each client sends in a round, "
        "so that the others' questions are told apart from them too; 0: none",
    )
    temperature: float = Field(0.05, gt=0, le=10, description="Temperature of its contrastive loss")
    chunk_length: int = Field(128, ge=4, le=100_000, description="Tokens of a chunk")
    chunk_overlap: int = Field(16, ge=0, description="Tokens that a chunk shares with the one before")
    most_chunks: int | None = Field(
        None, ge=1, description="Index at most this many chunks of a document; unset: all"
    )
    top: int = Field(
        10,
        ge=1,
        le=1000,
        description="Documents that a search finds; below 10, recall@10 and MRR@10 count those alone",
    )
    search: Literal["vector", "text", "hybrid"] = Field(
        "vector", description="vector: nearest chunks; text: matching words (BM25); hybrid: both, by rank"
    )
    merge: Literal["scores", "ranks"] = Field(
        "scores", description="Merge the clients' lists by score, or by reciprocal rank"
    )
    rerank: bool = Field(
        False, description="Order what was found by how likely the generator finds the question after it"
    )
    send_query_text: bool = Field(
        False, description="Send the question itself to the clients, not its vector alone"
    )
    share: Policy = Field(
        "passages",
        description="What leaves a client: passages; scores alone; or an answer that it writes itself",
    )
    share_of: dict[str, str] = Field(
        default_factory=dict, description="The same for single clients: [method.share_of] name = policy"
    )
    routing: Literal["none", "learned"] = Field(
        "none", description="learned: ask only the clients that are likely to hold the answer"
    )
    route_recall: float = Field(
        0.99,
        gt=0,
        le=1,
        description="Share of the clients' own development questions for which the right client is asked",
    )
    router_weight: float = Field(
        0.0,
        ge=0,
        le=100,
        description="Added to the score of a document: this times the log of the probability that the router "
        "gives its client; 0: the router chooses whom to ask, and no more",
    )
    privacy_epsilon: float | None = Field(
        None, gt=0, description="Perturb each query's vector: (n, epsilon)-DistanceDP; unset: do not"
    )
    generator: str | None = Field(
        None, description="Language model that writes answers: built-in, folder or hub id; unset: none"
    )
    answer_tokens: int = Field(96, ge=1, le=100_000, description="Longest answer")
    passages_given: int = Field(3, ge=1, le=100, description="Passages that the generator is given")
    measured_answers: int = Field(
        0,
        ge=0,
        description="Test questions on which the reference answer's loss is measured, with and without",
    )

    def default_learning_rate(self, kind: ModelKind) -> float:
        """The learning rate for a kind of model where the recipe sets none."""
        return 2e-5

    def answer_contents(self, kind: str, usual: tuple[Content, ...], task: str) -> tuple[Content, ...]:
        """Training sends vectors of passages too, where these are shared."""
        return (*usual, "vectors") if kind == "train" and self.sends_texts else usual

    def exchanges(self, kind: str) -> bool:
        """Routes where they are learnt; answers where a client writes some."""
        if kind in ("route", "calibrate"):
            return self.routing == "learned"
        return kind != "answer" or "answer" in (self.share, *self.share_of.values())

    def needed_contents(self, training: TrainingSettings, task: str) -> dict[Content, str]:
        """Vectors and what training and routing send. Passages and answers are not needed: a site that keeps
        them takes part in the search all the same.
        """
        name = f"method.name = {self.name!r}"
        needed: dict[Content, str] = {"counts": name, "vectors": self.sends_texts or name}
        if self.train != "none":
            needed["updates"] = "method.train"
        if self.routing == "learned":
            needed |= {"sums": "method.routing", "logits": "method.routing"}
        return needed

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.chunk_overlap >= self.chunk_length:
            raise ValueError(f"method.chunk_overlap = {self.chunk_overlap}: must be below chunk_length")
        if self.search != "vector" and not self.send_query_text:
            raise ValueError(
                f"method.search = {self.search!r}: words can only be matched where the question is sent; set "
                "method.send_query_text = true"
            )
        by_score = self.merge == "scores" and self.search != "text"
        if self.router_weight and not (self.routing == "learned" and by_score):
            raise ValueError(
                f"method.router_weight = {self.router_weight}: needs method.routing = 'learned', and vectors "
                "that are merged by score"
            )
        if self.privacy_epsilon is not None and self.send_query_text:
            raise ValueError(
                "method.privacy_epsilon: protects nothing while send_query_text = true sends the question"
            )
        if "answer" in (self.share, *self.share_of.values()) and not self.send_query_text:
            raise ValueError(
                "method.share = 'answer': a client writes an answer to a question that it is sent; set "
                "method.send_query_text = true"
            )
        if self.shared_negatives and self.train == "none":
            raise ValueError(
                f"method.shared_negatives = {self.shared_negatives}: needs method.train = 'full' or 'lora'"
            )
        if self.shared_negatives and "passages" not in (self.share, *self.share_of.values()):
            raise ValueError(
                f"method.shared_negatives = {self.shared_negatives}: no client lends any while method.share "
                f"= {self.share!r}; only those with 'passages' do"
            )
        for name, policy in self.share_of.items():
            if policy not in ("passages", "scores", "answer"):
                raise ValueError(
                    f"method.share_of.{name} = {policy!r}: must be 'passages', 'scores' or 'answer'"
                )
        for key in ("rerank", "measured_answers"):
            if getattr(self, key) and self.generator is None:
                raise ValueError(f"method.{key}: needs method.generator")
        return self

    @property
    def reads_targets(self) -> bool:
        """Where the encoder is trained; searches read documents in chunks, of which nothing is cut."""
        return self.train != "none"

    @property
    def changes_base(self) -> str | None:
        """Where all of the encoder is trained."""
        return "method.train = 'full'" if self.train == "full" else None

    @property
    def named_models(self) -> tuple[str, ...]:
        """The model that writes answers."""
        return () if self.generator is None else (self.generator,)

    @property
    def sends_texts(self) -> str | None:
        """Vectors of passages are lent to other clients."""
        return "method.shared_negatives" if self.shared_negatives else None

    def policy_of(self, client: str) -> str:
        """What may leave a client."""
        return self.share_of.get(client, self.share)

    def check_sections(self, baseline: str, sections: Mapping[str, Any]) -> None:
        """Refuse what has no meaning for retrieval."""
        super().check_sections(baseline, sections)
        if baseline == "local":
            raise ValueError(
                "baseline = 'local': a search of one client's own documents merges nothing; allowed "
                "for method.name = 'retrieval': federated, centralised"
            )
        for key in UNTRAINED if self.train == "none" else ():
            if sections[key] != type(sections[key])():
                raise ValueError(
                    f"[{key}]: has no meaning while method.train = 'none'; leave it at its defaults"
                )
        for key, setting, allowed in CHANGES_ALONE if self.shared_negatives else ():
            if (value := getattr(sections[key], setting)) != allowed:
                raise ValueError(
                    f"{key}.{setting} = {value!r}: is for changes of weights, not for the vectors of "
                    f"method.shared_negatives; leave it at {allowed!r}"
                )
        if self.shared_negatives and sections["aggregation"].rule == "fltrust":
            raise ValueError(
                "aggregation.rule = 'fltrust': the server's own training has no negatives to borrow; leave "
                "method.shared_negatives at 0"
            )
        if self.train == "none" and sections["rounds"].count != 1:
            raise ValueError(
                f"rounds.count = {sections['rounds'].count}: with method.train = 'none' there is nothing to "
                "repeat; set rounds.count = 1"
            )
