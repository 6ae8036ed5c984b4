"""The recipe's section on prompt engineering."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from ...training.settings import TrainingSettings
from ..contents import Content
from ..registry import register
from ..settings import MethodSettingsBase
from .limits import check_template, check_texts
from .templates import INPUT, LABEL, placeholders_in

OWN_KEYS: dict[str, tuple[str, ...]] = {
    "selection": (
        "instructions_file",
        "bandit",
        "candidates_per_round",
        "exploration",
        "edits",
        "synonyms",
        "breed",
        "breed_every",
    ),
    "in_context": (
        "preamble",
        "demonstrations",
        "shared_demonstrations",
        "retriever",
        "prior",
        "similarity_temperature",
    ),
    "black_box": (
        "prompt_length",
        "dimensions",
        "covariance",
        "sigma",
        "population",
        "local_generations",
        "client_weights",
    ),
}
"""The keys that belong to one strategy alone."""


@register(".method:prompt_engineering", symbol="cross", colours=("#7a4fbf", "#b598ec"), order=110)
class PromptEngineeringSettings(MethodSettingsBase):
    """Prompts found by forward passes only; the model's weights stay as they are."""

    with_head: ClassVar[bool] = False
    sends_weights: ClassVar[bool] = False
    fills_prompts: ClassVar[bool] = True
    not_for: ClassVar[tuple[str, ...]] = (
        "training",
        "aggregation",
        "personalisation",
        "compression",
        "attack",
        "participation.partial",
        "participation.minimum_work",
        "participation.buffer",
    )

    name: Literal["prompt_engineering"] = "prompt_engineering"
    strategy: Literal["selection", "in_context", "black_box"] = Field(
        "selection",
        description="selection: a bandit over candidate prompts; in_context: Fed-ICL; black_box: CMA-ES over "
        "a soft prompt",
    )
    instructions: list[str] = Field(
        default_factory=list,
        description="Templates: {input} is the text, {labels} the label list; for an encoder {label} is a "
        "label's text. All are candidates (selection), the first is used (others); unset: a plain one",
    )
    verbalisers: dict[str, str | list[str]] = Field(
        default_factory=dict,
        description="How each label is written or described: a text, or a list of alternatives (selection)",
    )
    calibrate: bool | None = Field(
        None,
        description="Subtract what the model says of a content-free input; unset: for language models only",
    )
    temperature: float = Field(
        0.05, gt=0, le=100, description="Encoder: a label's logit is its cosine divided by this"
    )
    examples: int = Field(
        16,
        ge=1,
        le=1_000_000,
        description="Private examples a client scores on in a round (selection, black_box)",
    )

    instructions_file: str | None = Field(
        None, description="selection: a UTF-8 file of further templates, one a line (\\n is a line break)"
    )
    bandit: Literal["successive_halving", "ucb", "thompson"] = Field(
        "successive_halving",
        description="selection: how the server chooses what is scored next",
    )
    candidates_per_round: int = Field(
        8, ge=1, le=10_000, description="selection: candidates scored in a round (ucb, thompson)"
    )
    exploration: float = Field(
        0.5, ge=0, le=100, description="selection: width of the confidence bound (ucb)"
    )
    edits: int = Field(
        0, ge=0, le=10_000, description="selection: candidates made from the given ones by edits"
    )
    synonyms: dict[str, list[str]] = Field(
        default_factory=dict,
        description="selection: paraphrases for edits: a text and what may stand for it; unset: a small list",
    )
    breed: int = Field(
        0,
        ge=0,
        le=10_000,
        description="selection: candidates bred from the best every breed_every rounds",
    )
    breed_every: int = Field(5, ge=1, le=1_000_000, description="selection: rounds between two broods")

    preamble: str = Field("", description="in_context: text before the demonstrations; {labels} as above")
    demonstrations: int = Field(
        4, ge=1, le=1000, description="in_context: nearest private examples put into the context"
    )
    shared_demonstrations: int = Field(
        0, ge=0, le=1000, description="in_context: answered public texts put before them, from round 2 on"
    )
    retriever: str = Field(
        "builtin:minilm", description="in_context: the model whose embeddings say which texts are near"
    )
    prior: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="in_context: weight of the current answer, from round 2 on (classification)",
    )
    similarity_temperature: float = Field(
        0.1,
        gt=0,
        le=100,
        description="in_context: a client's weight is exp(mean similarity / this); 100: nearly all alike",
    )

    prompt_length: int = Field(8, ge=1, le=10_000, description="black_box: virtual tokens")
    dimensions: int = Field(
        100,
        ge=2,
        le=10_000,
        description="black_box: numbers that are searched; a map makes tokens of them",
    )
    covariance: Literal["diagonal", "full"] = Field(
        "diagonal", description="black_box: covariance of the search distribution"
    )
    sigma: float = Field(1.0, gt=0, le=1000, description="black_box: step size at the start")
    population: int | None = Field(
        None, ge=4, le=10_000, description="black_box: candidates a generation; unset: 4 + 3 ln(dimensions)"
    )
    local_generations: int = Field(
        5, ge=1, le=10_000, description="black_box: generations a client searches in a round"
    )
    client_weights: Literal["rank", "examples"] = Field(
        "rank",
        description="black_box: a client's weight: its loss's rank, as in FedBPT, or its number of examples",
    )

    @property
    def examples_scored(self) -> int | None:
        """Private examples on which a prompt is scored in a round."""
        return None if self.strategy == "in_context" else self.examples

    def answer_contents(self, kind: str, usual: tuple[Content, ...], task: str) -> tuple[Content, ...]:
        """Answers to public queries are texts where texts are generated."""
        return ("texts", *usual) if kind == "answer" and task == "generation" else usual

    def check_limits(self) -> None:
        """Refuse prompts that would fill the memory when they are written out."""
        for template in (*self.instructions, self.preamble):
            check_template("method.instructions", template)
        written = [[texts] if isinstance(texts, str) else texts for texts in self.verbalisers.values()]
        check_texts("method.verbalisers", [text for row in written for text in row])
        check_texts("method.synonyms", [text for row in self.synonyms.values() for text in row])

    def needed_contents(self, training: TrainingSettings, task: str) -> dict[Content, str]:
        """Scores; by strategy, the distribution of a search or answers to public queries."""
        needed: dict[Content, str] = {"counts": f"method.name = {self.name!r}"}
        if self.strategy == "black_box":
            needed["updates"] = "method.strategy"
        if self.strategy == "in_context":
            needed["logits"] = "method.strategy"
            if task == "generation":
                needed["texts"] = "method.strategy"
        return needed

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for strategy, keys in OWN_KEYS.items():
            for key in keys:
                value = getattr(self, key)
                if strategy != self.strategy and value != type(self).model_fields[key].get_default(
                    call_default_factory=True
                ):
                    raise ValueError(
                        f"{key} = {value!r}: belongs to strategy = {strategy!r}, not {self.strategy!r}"
                    )
        if self.strategy == "in_context" and self.examples != type(self).model_fields["examples"].default:
            raise ValueError(
                f"examples = {self.examples}: strategy = 'in_context' takes the nearest; set demonstrations"
            )
        for template in self.instructions:
            if not {INPUT, LABEL} & placeholders_in(template):
                raise ValueError(
                    f"instructions: {template!r} has neither {INPUT} (language models) nor {LABEL} (encoders)"
                )
        for label, texts in self.verbalisers.items():
            alternatives = [texts] if isinstance(texts, str) else texts
            if not alternatives or any(not text.strip() for text in alternatives):
                raise ValueError(
                    f"verbalisers.{label}: must hold a text or a list of texts, none of them empty"
                )
            if len(alternatives) > 1 and self.strategy != "selection":
                raise ValueError(f"verbalisers.{label}: alternatives need strategy = 'selection'")
        if any(not texts for texts in self.synonyms.values()):
            raise ValueError("synonyms: each text needs one paraphrase or more")
        return self

    @property
    def named_models(self) -> tuple[str, ...]:
        """The model by whose vectors demonstrations are chosen."""
        return (self.retriever,) if self.strategy == "in_context" else ()

    @property
    def opens_file(self) -> str | None:
        """The file of further templates."""
        return None if self.instructions_file is None else "method.instructions_file"
