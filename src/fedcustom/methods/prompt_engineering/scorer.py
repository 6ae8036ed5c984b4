"""Scores of texts under a prompt by a frozen model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ...core.errors import RecipeError
from ...core.per_list import PerList
from ...data.encode import input_cut, shorten
from ...data.examples import Example
from ...data.tokens import TokenizedExample, tokenize
from ...models.configuration import context_length
from ...models.embedding import embed
from ...models.inference import Predictions, predict
from ...models.likelihood import continuation_scores, prompt_ids
from ..tuning.technique import Context
from .settings import PromptEngineeringSettings
from .templates import CONTENT_FREE, Candidate, check_template, continuation

Matrix = np.ndarray[Any, np.dtype[np.float64]]


class Scorer:
    """Logits of labels and losses of targets, by forward passes alone.

    A language model's logit of label l for the text x under prompt c is the pointwise mutual information
    ``log p(v_l | c(x)) - log p(v_l | c("N/A"))`` of the label's text v_l: contextual calibration (Zhao et al.
    2021). It is a sum over the label's tokens, not a mean: the same tokens are in both terms, so that their
    number cancels, whereas a mean would make the sure later tokens of a long label count as evidence.

    An encoder's is ``cos(e(x), e(d_l)) / temperature`` with d_l the label's text in the template.
    """

    def __init__(self, settings: PromptEngineeringSettings, context: Context) -> None:
        self.context, self.base = context, context.base
        self.encoder = context.base.architecture == "encoder"
        self.calibrate = not self.encoder if settings.calibrate is None else settings.calibrate
        self.temperature = settings.temperature
        self._embedded = PerList[Matrix]()
        self._described: dict[tuple[str, tuple[str, ...]], Matrix] = {}
        self._free: dict[tuple[str, tuple[str, ...]], Matrix] = {}

    @property
    def generates(self) -> bool:
        """Whether the task is to write a text."""
        return self.base.task.kind == "generation"

    def check(self, candidate: Candidate, where: str) -> None:
        """Refuse a candidate that does not fit the model.

        Raises:
            RecipeError: a placeholder is missing, or prompt, input and answer exceed the model's context.
        """
        check_template(candidate.template, encoder=self.encoder, where=where)
        limit = context_length(self.base.model.config)
        if limit is None:
            return
        if self.encoder:
            lengths = [len(ids) for ids in self.base.tokenizer(candidate.describe())["input_ids"]]
            needed, what = max(lengths), "a label's description"
        else:
            data = self.context.data
            (prompt,) = prompt_ids(self.base, [candidate.fill("")])
            needed, what = len(prompt) + data.max_length + self._answer_length(candidate), "with its input"
        if needed > limit:
            raise RecipeError(
                f"{where}: {candidate.template[:60]!r} takes {needed} tokens {what}; {self.base.name} has "
                f"{limit} positions"
            )

    def logits(self, candidate: Candidate, examples: list[Example], prefix: Tensor | None = None) -> Matrix:
        """Logits of (examples, labels)."""
        if self.encoder:
            return self._cosines(candidate, self.embedded(examples))
        scores = self.label_scores(
            [candidate.fill(text) for text in self.inputs(examples)], candidate.labels, prefix
        )
        if not self.calibrate:
            return scores
        if prefix is not None:
            return scores - self.label_scores([candidate.fill(CONTENT_FREE)], candidate.labels, prefix)
        return scores - self.content_free(candidate)

    def content_free(self, candidate: Candidate) -> Matrix:
        """What the model says of the content-free input, (1, labels), computed once a candidate."""
        key = (candidate.template, candidate.labels)
        if key not in self._free:
            if self.encoder:
                free = embed(self.base, [CONTENT_FREE], max_length=self.context.data.max_length)
                self._free[key] = free.astype(np.float64) @ self.described(candidate).T
            else:
                self._free[key] = self.label_scores([candidate.fill(CONTENT_FREE)], candidate.labels)
        return self._free[key]

    def label_scores(
        self, prompts: Sequence[str], labels: Sequence[str], prefix: Tensor | None = None
    ) -> Matrix:
        """Log-likelihoods (prompts, labels) without calibration. All prompts end alike."""
        ending = prompts[0] if prompts else ""
        reads = self.base.architecture == "encoder-decoder"
        texts = [label if reads else continuation(ending, label) for label in labels]
        size = self.context.evaluation.batch_size
        return continuation_scores(self.base, prompts, texts, batch_size=size, prefix=prefix)

    def losses(self, prompts: Sequence[str], examples: list[Example], model: Any = None) -> Matrix:
        """For each prompt with its example's target: the summed loss in nats and the number of target tokens,
        (prompts, 2).
        """
        return predict(
            model or self.base.model, self.base, self._tokenized(prompts, examples), self.context.evaluation
        ).scores

    def predict(self, candidate: Candidate, examples: list[Example], *, texts: bool) -> Predictions:
        """What the model says of examples under one prompt."""
        if not self.generates:
            return Predictions(self.logits(candidate, examples))
        return self.predict_texts(
            [candidate.fill(text) for text in self.inputs(examples)], examples, texts=texts
        )

    def predict_texts(
        self, prompts: Sequence[str], examples: list[Example], *, texts: bool, model: Any = None
    ) -> Predictions:
        """Losses and, if asked for, texts after prompts of their own."""
        tokens = self._tokenized(prompts, examples)
        return predict(model or self.base.model, self.base, tokens, self.context.evaluation, texts=texts)

    def sources(self, prompts: Sequence[str]) -> list[list[int]]:
        """The token ids of prompts as :meth:`predict_texts` reads them."""
        return [row.source.tolist() for row in self._tokenized(prompts, [Example("")] * len(prompts))]

    def inputs(self, examples: list[Example]) -> list[str]:
        """The examples' texts, cut to ``data.max_length`` tokens by ``data.truncate``."""
        return [text for text, _ in shorten(self.base.tokenizer, examples, input_cut(self.context.data))]

    def embedded(self, examples: list[Example]) -> Matrix:
        """Vectors of the examples' texts, computed once a list."""
        if examples not in self._embedded:
            self._embedded[examples] = self.vectors(examples)
        return self._embedded[examples]

    def vectors(self, examples: list[Example]) -> Matrix:
        """Vectors of the examples' texts, (examples, width)."""
        data, size = self.context.data, self.context.evaluation.batch_size
        vectors = embed(
            self.base,
            [example.text for example in examples],
            max_length=data.max_length,
            batch_size=size,
            how=data.truncation,
            fields=[example.fields for example in examples],
        )
        return vectors.astype(np.float64)

    def described(self, candidate: Candidate) -> Matrix:
        """Vectors of the labels' descriptions, (labels, width), computed once a candidate."""
        key = (candidate.template, candidate.labels)
        if key not in self._described:
            limit = context_length(self.base.model.config) or 2**20  # it was checked that they fit
            vectors = embed(self.base, candidate.describe(), max_length=limit)
            self._described[key] = vectors.astype(np.float64)
        return self._described[key]

    def from_vectors(self, candidate: Candidate, vectors: Matrix) -> Matrix:
        """An encoder's logits of texts that are embedded already."""
        return self._cosines(candidate, vectors)

    def _cosines(self, candidate: Candidate, vectors: Matrix) -> Matrix:
        scores: Matrix = vectors @ self.described(candidate).T
        if self.calibrate:
            scores = scores - self.content_free(candidate)
        return scores / self.temperature

    def _answer_length(self, candidate: Candidate) -> int:
        if self.generates:
            return self.context.data.max_target_length
        texts = [f" {label}" for label in candidate.labels]
        return max(len(ids) for ids in self.base.tokenizer(texts, add_special_tokens=False)["input_ids"])

    def _tokenized(self, prompts: Sequence[str], examples: list[Example]) -> list[TokenizedExample]:
        filled = [
            Example(prompt, target=example.target) for prompt, example in zip(prompts, examples, strict=True)
        ]
        limit = context_length(self.base.model.config) or 2**20
        # Candidates and demonstrations were fitted to the context before; here nothing is to be cut off.
        data = self.context.data.model_copy(update={"max_length": limit})
        return tokenize(
            filled,
            self.base.tokenizer,
            self.base.task,
            data,
            sequence_to_sequence=self.base.sequence_to_sequence,
            rules=self.base.token_rules,
        )


def log_softmax(logits: Matrix) -> Matrix:
    """Normalised log-probabilities, row by row."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: Matrix = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
