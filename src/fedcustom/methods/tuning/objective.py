"""Training objectives: batches from examples, and losses from batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ...data.encode import encode_examples, encode_passages, input_cut
from ...data.examples import Example
from ...data.settings import DataSettings
from ...data.tokens import Batch, TokenizedExample, collate, pad, tokenize
from ...evaluation.settings import EvaluationSettings
from ...models.forward import (
    classification_loss,
    classification_losses,
    generation_loss,
    pooled,
    target_losses,
)
from ...models.inference import Predictions, predict, to_device
from ...models.load import Base


class Objective(Protocol):
    """A loss, and the form in which it wants its examples."""

    separable: bool
    """Whether a batch's loss is a mean over its rows, so that clients may share a batch."""

    one_pass: bool
    """Whether a loss takes one forward pass, over the batch's rows in their order."""

    def tokens(self, examples: Sequence[Example]) -> list[TokenizedExample]:
        """The examples' tokens."""

    def collate(self, examples: Sequence[TokenizedExample]) -> Batch:
        """One batch, where the model is."""

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """The batch's mean loss."""

    def row_losses(self, model: Any, batch: Batch) -> Tensor:
        """Each row's summed loss, (rows,), where the loss is separable."""

    def units(self, example: TokenizedExample) -> int:
        """How much a row counts in the mean."""

    def predict(
        self, model: Any, examples: Sequence[TokenizedExample], settings: EvaluationSettings, *, texts: bool
    ) -> Predictions:
        """What a model says of examples, from which metrics are computed; with ``texts``, also what it
        writes.
        """


class Supervised:
    """Cross-entropy of labels, or of target tokens."""

    separable = one_pass = True

    def __init__(self, base: Base, data: DataSettings) -> None:
        self.base, self.data = base, data
        self.classes = base.task.kind == "classification"

    def tokens(self, examples: Sequence[Example]) -> list[TokenizedExample]:
        """The examples' tokens."""
        base = self.base
        return tokenize(
            examples,
            base.tokenizer,
            base.task,
            self.data,
            sequence_to_sequence=base.sequence_to_sequence,
            rules=base.token_rules,
            chat=base.chat,
        )

    def collate(self, examples: Sequence[TokenizedExample]) -> Batch:
        """One padded batch."""
        base = self.base
        sequence_to_sequence = base.sequence_to_sequence
        padding = base.tokenizer.pad_token_id
        batch = collate(
            examples, padding, base.task, sequence_to_sequence=sequence_to_sequence, all_answers=True
        )
        return to_device(batch, base.device)

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """Mean over examples or over target tokens."""
        with self.base.autocast():
            if self.classes:
                return classification_loss(model, batch)
            return generation_loss(
                model, batch, sequence_to_sequence=self.base.sequence_to_sequence, output=self.base.output
            )

    def row_losses(self, model: Any, batch: Batch) -> Tensor:
        """Each example's loss, summed over its target tokens."""
        with self.base.autocast():
            if self.classes:
                return classification_losses(model, batch)
            losses, _ = target_losses(
                model, batch, sequence_to_sequence=self.base.sequence_to_sequence, output=self.base.output
            )
            return losses

    def units(self, example: TokenizedExample) -> int:
        """One, or the target tokens that are predicted, those of earlier answers among them."""
        if self.classes:
            return 1
        first = self.base.sequence_to_sequence or len(example.source) > 0
        return len(example.target) + len(example.answers) - (0 if first else 1)

    def predict(
        self, model: Any, examples: Sequence[TokenizedExample], settings: EvaluationSettings, *, texts: bool
    ) -> Predictions:
        """Logits of labels, or losses of targets; with ``texts``, also generated texts."""
        return predict(model, self.base, examples, settings, texts=texts)


class Contrastive:
    """InfoNCE with the batch's other passages as negatives (van den Oord et al. 2018; Karpukhin et al. 2020).

    With unit vectors q_i of questions and p_j of passages, and a temperature t::

        loss = - mean_i log( exp(q_i p_i / t) / sum_j exp(q_i p_j / t) )

    A passage that stands in the batch twice is no negative of its own question. ``negatives``, unit vectors
    (vectors, width), are further p_j that are not trained.
    """

    separable = one_pass = False

    def __init__(self, base: Base, data: DataSettings, temperature: float) -> None:
        self.base, self.data, self.temperature = base, data, temperature
        self.negatives: Tensor | None = None

    def tokens(self, examples: Sequence[Example]) -> list[TokenizedExample]:
        """Question and passage, each cut to the recipe's length."""
        if not examples:
            return []
        tokenizer, rules = self.base.tokenizer, self.base.token_rules
        questions = encode_examples(tokenizer, examples, input_cut(self.data), rules)
        limit = self.data.max_target_length
        passages = encode_passages(tokenizer, [e.target for e in examples], limit, rules)
        return [
            TokenizedExample.of(question.ids, passage.ids)
            for question, passage in zip(questions, passages, strict=True)
        ]

    def collate(self, examples: Sequence[TokenizedExample]) -> Batch:
        """Questions, passages, and which of the passages are the same."""
        padding = self.base.tokenizer.pad_token_id
        questions = pad([e.source for e in examples], padding)
        passages = pad([e.target for e in examples], padding)
        content = [e.target.tobytes() for e in examples]
        same = torch.tensor([[one == other for other in content] for one in content])
        same.fill_diagonal_(False)
        batch = {
            **questions,
            "passage_ids": passages["input_ids"],
            "passage_mask": passages["attention_mask"],
            "same": same,
            "labels": torch.arange(len(examples)),
        }
        return to_device(batch, self.base.device)

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """The mean over questions."""
        with self.base.autocast():
            questions = pooled(model, batch)
            passages = pooled(
                model, {"input_ids": batch["passage_ids"], "attention_mask": batch["passage_mask"]}
            )
        scores = (questions @ passages.T).masked_fill(batch["same"], -torch.inf)
        if self.negatives is not None:
            scores = torch.cat([scores, questions @ self.negatives.to(questions).T], dim=1)
        return functional.cross_entropy(scores / self.temperature, batch["labels"])

    def row_losses(self, model: Any, batch: Batch) -> Tensor:
        """Not defined: a question's loss depends on the whole batch."""
        raise NotImplementedError

    def units(self, example: TokenizedExample) -> int:
        """One."""
        return 1

    def predict(
        self, model: Any, examples: Sequence[TokenizedExample], settings: EvaluationSettings, *, texts: bool
    ) -> Predictions:
        """Not defined: questions are answered by a search."""
        raise NotImplementedError
