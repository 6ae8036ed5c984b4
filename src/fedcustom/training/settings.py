"""The recipe's section on local training."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from ..core.settings import Settings

TRIAL_ROUNDS = (2, 6)
"""Rounds that a search gives each of its learning rates, and then the better half, from the start again."""

LEAST_TEXTS = 3
"""Different texts of a label that a client must have by default for these to help fit a head."""


class TrainingSettings(Settings):
    """What one client does with the state it was sent."""

    local_epochs: float = Field(
        1,
        gt=0,
        description="Passes over the client's training data a round; 0.25: the next quarter of it in each",
    )
    local_steps: int | None = Field(
        None, ge=1, description="Optimiser steps a round, in place of local_epochs"
    )
    batch_size: int = Field(16, ge=1, description="Examples a step")
    optimizer: Literal["adamw", "sgd", "muon"] = Field(
        "adamw",
        description="Client optimiser, fresh in every round (baselines keep its state); muon: for matrices "
        "(the keys of a prefix in a layer are one, its values another), adamw for all else",
    )
    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] | None = Field(
        None,
        description="Client learning rate; unset: the method's own default; auto: the best of four around it "
        "in some rounds of training before the first",
    )
    search_rates: list[Annotated[float, Field(gt=0)]] | None = Field(
        None,
        min_length=2,
        max_length=16,
        description="Rates that are tried before training begins, by successive halving on the development "
        "split; learning_rate = 'auto' sets four",
    )
    head_learning_rate: float | None = Field(
        None,
        gt=0,
        description="Learning rate of the classification head, which then trains where it was fitted in "
        "round 1; unset: learning_rate",
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay (adamw, muon), L2 (sgd)")
    momentum: float = Field(0.0, ge=0, lt=1, description="Momentum (sgd)")
    clip_norm: float = Field(1.0, ge=0, description="Largest gradient norm; 0: no clipping")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="How the learning rate falls from the first round to the last"
    )
    warmup_rounds: int = Field(0, ge=0, description="Rounds over which the learning rate rises linearly")
    proximal: float = Field(
        0.0, ge=0, description="FedProx: weight mu of mu/2 * |w - w_global|^2 in the client's loss"
    )
    label_skew: Literal["auto", "none", "adjust", "balance"] | None = Field(
        None,
        description="Classification, remedy where clients have few of the labels. balance: cohorts that "
        "together have nearly everybody's labels (rounds.selection); adjust: a client's logits, in training, "
        "by its own label shares (logit_adjustment); none: neither; unset, or auto: balance where that is "
        "possible, else adjust, with a head that is fitted by default, else none (docs/label_skew.md)",
    )
    fit_head: bool | None = Field(
        None,
        description="Classification: whether clients together fit the head before and after training "
        "(fit_head_rounds); unset: where that is possible",
    )
    logit_adjustment: float | None = Field(
        None,
        ge=0,
        le=10,
        description="Classification, against label skew: in training, this times the log of the client's own "
        "label shares (once the head was fitted: less that of everybody's) is added to the logits; 1: "
        "balanced softmax; 0: off; unset: 1 with a head that is fitted by default and cohorts that are not "
        "balanced, else 0",
    )
    prior_count: float = Field(
        1.0,
        gt=0,
        le=1e6,
        description="Added to each label's count in those shares, so that none is 0 (logit_adjustment)",
    )
    freeze_head_rounds: int | None = Field(
        None,
        ge=0,
        description="First rounds in which the head rests, and is not sent; unset: all where it is fitted in "
        "round 1, else none",
    )
    fit_head_rounds: list[int] | None = Field(
        None,
        description="Rounds in which clients send sums of the head's inputs instead of training, and the "
        "server fits the head to them; 1: before training begins, -1 (the last): after it; []: none; unset: "
        "[1, -1] where that is possible and logit_adjustment is unset too, else [] (docs/label_skew.md)",
    )
    fit_head_clients: int | None = Field(
        None,
        ge=2,
        description="At most so many clients, drawn at random, are asked in a round that fits the head; "
        "unset: all, or by default half as many as train in all rounds, where all would be more (of natural "
        "clients, who are drawn by their numbers of examples, never fewer than 100)",
    )
    fit_head_steps: int = Field(
        12,
        ge=0,
        le=1000,
        description="Further exchanges of such a round, by which the head becomes the logistic regression of "
        "all clients' examples; 0: it stays the linear discriminant of the sums",
    )
    fit_head_c: float = Field(
        10.0,
        gt=0,
        description="Inverse strength of that regression's penalty: scikit-learn's C for vectors of length 1",
    )
    fit_head_least_texts: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="A label takes part in fitting the head at a client that has so many different texts of "
        "it, and gradients only where no text has more than one in so many of their weight, so that no sum "
        "is one text. Who has candidates can still test whether a text is in a sum (docs/classification.md); "
        "1: all texts take part, which protects none; unset: 3",
    )
    cohort_width: int | None = Field(
        None,
        ge=1,
        description="Clients trained in one batch, with the same result; unset: as memory allows; 1: none",
    )
    gradient_checkpointing: bool | None = Field(
        None,
        description="Keep the inputs of layers alone for the backward pass, and compute the rest again: a "
        "fraction of the memory, about a third more time (Chen et al. 2016); unset: off",
    )
    objective: Literal["dpo"] | None = Field(
        None,
        description="What is minimised. dpo: direct preference optimisation (it implies data.task = "
        "'preference'); unset: dpo for preference, else cross-entropy, or what the method says",
    )
    beta: float | None = Field(
        None,
        gt=0,
        le=1e3,
        description="Preference: how strongly the model is kept to the base model, by which it is rewarded; "
        "unset: 0.1",
    )
    label_smoothing: float | None = Field(
        None,
        ge=0,
        lt=0.5,
        description="Preference: the share of pairs whose answers may be the wrong way round (conservative "
        "DPO, Mitchell 2023); unset: 0",
    )
    dropout: bool = Field(False, description="Use the base model's dropout while training")

    @field_validator("local_epochs")
    @classmethod
    def _whole_epochs_are_integers(cls, epochs: float) -> float:
        """So that recipes, and digests of them, say 1 whether 1 or 1.0 was asked for."""
        return int(epochs) if epochs == int(epochs) else epochs

    @model_validator(mode="after")
    def _momentum_is_plain_gradient_steps(self) -> Self:
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(
                f"momentum = {self.momentum}: is for optimizer = 'sgd'; {self.optimizer} has its own"
            )
        return self

    @model_validator(mode="after")
    def _says_once_how_long(self) -> Self:
        if self.local_steps is not None and self.local_epochs != 1:
            raise ValueError(
                f"local_epochs = {self.local_epochs}: has no effect while local_steps = {self.local_steps} "
                "says how long a client trains; set one of them"
            )
        return self

    def rounds_of_head_fits(self, last: int) -> frozenset[int]:
        """``fit_head_rounds`` of a run with ``last`` rounds, counted from 1."""
        return frozenset(last if number == -1 else number for number in self.fit_head_rounds or ())

    def trials(self) -> list[int]:
        """How many rounds each trial of a search of learning rates has."""
        rates = len(self.search_rates or ())
        return [n for part, n in enumerate(TRIAL_ROUNDS) for _ in range(rates and max(1, rates >> part))]

    @property
    def least_texts(self) -> int:
        """``fit_head_least_texts``, or its default."""
        return LEAST_TEXTS if self.fit_head_least_texts is None else self.fit_head_least_texts

    def clients_of_head_fits(self, count: int) -> int:
        """How many of ``count`` clients are asked in such a round."""
        return min(self.fit_head_clients or count, count)
