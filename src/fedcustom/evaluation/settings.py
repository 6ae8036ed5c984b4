"""The recipe's section on evaluation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..core.settings import Settings

CLASSIFICATION_METRICS = ("accuracy", "macro_f1", "loss", "calibration_error")
TEXT_METRICS = ("bleu", "chrf", "rouge_l", "exact_match", "token_f1")
"""Metrics of generated texts."""

CHOICE_METRIC = "choice_accuracy"
"""Of examples with options: how often the likeliest is the right one."""

GENERATION_METRICS = ("loss", *TEXT_METRICS, CHOICE_METRIC)
PREFERENCE_METRICS = ("loss", "preference_accuracy", "reward_margin", "likelihood_accuracy")
SHARES = frozenset({CHOICE_METRIC, "preference_accuracy", "likelihood_accuracy"})
"""Of generators' metrics those that are shares of examples, from 0 to 1."""

RETRIEVAL_METRICS = ("recall_at_1", "recall_at_5", "recall_at_10", "mrr")


class EvaluationSettings(Settings):
    """When quality is measured, and by what the best round is chosen."""

    every: int = Field(1, ge=1, description="Rounds between evaluations on the development split")
    select: Literal["best", "last"] = Field(
        "best", description="Which round's state is kept: the best on the development split, or the last"
    )
    metric: str | None = Field(
        None,
        description="Metric of that choice; unset: accuracy, loss (generation, chat, preference) or mrr "
        "(retrieval, MRR@10)",
    )
    batch_size: int = Field(64, ge=1, description="Examples a forward pass in evaluation")
    calibrate: bool = Field(
        True,
        description="Classification: after the last round, divide the logits by the temperature that gives "
        "the development split the least loss",
    )
    untuned: bool = Field(True, description="Evaluate the untuned base model too, for comparison")
    perturb: list[Literal["typos", "characters", "words"]] = Field(
        default_factory=list,
        description="Score perturbed test texts beside the clean ones: mistyped words, characters replaced "
        "at random, words left out",
    )
    perturb_rate: float = Field(
        0.1, gt=0, le=1, description="Share of the words or characters that are perturbed"
    )
    generate: bool | None = Field(
        None,
        description="Generation: write texts for test inputs and score them; false: the loss is all; unset: "
        "true",
    )
    generate_limit: int | None = Field(
        None,
        ge=1,
        description="Generation: write texts after the last round only, for so many test inputs at most; "
        "everything else is evaluated by the loss; unset: for all of them, by the untuned model too",
    )
    max_new_tokens: int = Field(64, ge=1, description="Generation: longest text that is written")
    beams: int = Field(1, ge=1, le=64, description="Generation: beams of the search; 1 is greedy")

    @property
    def writes(self) -> bool:
        """Whether texts are written at all."""
        return self.generate is not False

    @property
    def writes_all(self) -> bool:
        """Whether texts are written for all test inputs, wherever one global model is evaluated on them."""
        return self.writes and self.generate_limit is None
