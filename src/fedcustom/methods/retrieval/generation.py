"""Answers generated from passages, and the likelihood of reference answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...core.errors import ModelError
from ...data.examples import LearningTask
from ...data.tokens import TokenizedExample
from ...evaluation.settings import EvaluationSettings
from ...models.configuration import context_length
from ...models.inference import generate, predict
from ...models.load import Base, load_base
from ...models.settings import ModelSettings


class Generator:
    """A language model that is given passages and a question."""

    def __init__(self, model: ModelSettings, evaluation: EvaluationSettings, answer_tokens: int) -> None:
        """Load the model.

        Raises:
            ModelError: it cannot be loaded, or its context is too short.
        """
        self.base: Base = load_base(model, LearningTask("generation"), 0)
        self.answer_tokens = answer_tokens
        self.evaluation = evaluation.model_copy(update={"max_new_tokens": answer_tokens})
        limit = context_length(self.base.model.config)
        self.room = (limit or 4096) - answer_tokens
        if self.room < 32:
            raise ModelError(
                f"method.answer_tokens = {answer_tokens}: {model.base} has a context of {limit} positions, "
                "which leaves no room for a question"
            )

    def write(self, questions: Sequence[str], passages: Sequence[Sequence[str]]) -> list[str]:
        """An answer to each question, from its passages."""
        sources = [
            np.asarray(self.prompt(question, given), dtype=np.int32)
            for question, given in zip(questions, passages, strict=True)
        ]
        return generate(self.base.model, self.base, sources, self.evaluation)

    def loss(
        self, questions: Sequence[str], passages: Sequence[Sequence[str]], answers: Sequence[str]
    ) -> float:
        """Loss per token (nats) of the beginnings of reference answers after question and passages."""
        examples = []
        for question, given, answer in zip(questions, passages, answers, strict=True):
            target = self._ids(" " + answer)[: self.answer_tokens]
            examples.append(TokenizedExample.of(self.prompt(question, given), target))
        scores = self._scores(examples)
        return float(scores[:, 0].sum() / scores[:, 1].sum())

    def likelihood(self, question: str, passages: Sequence[str]) -> list[float]:
        """Mean log-probability of the question's tokens after each passage (UPR, Sachan et al. 2022)."""
        target = self._ids(" " + question)[: self.room // 2]
        examples = []
        for passage in passages:
            ending = self._ids("\nQuestion:")
            source = self._ids(passage)[: self.room - len(target) - len(ending)] + ending
            examples.append(TokenizedExample.of(source, target))
        scores = self._scores(examples)
        return [float(-total / count) for total, count in scores]

    def prompt(self, question: str, passages: Sequence[str]) -> list[int]:
        """Tokens of numbered passages and the question; passages are cut such that all fits the context."""
        ending = self._ids(f"Question: {question}\nAnswer:")[-self.room :]
        room = self.room - len(ending)
        each = room // max(1, len(passages))
        ids: list[int] = []
        for number, passage in enumerate(passages, start=1):
            ids += self._ids(f"[{number}] {passage}"[: 20 * each])[: max(0, each - 2)] + self._ids("\n")
        return ids[:room] + ending

    def _scores(self, examples: Sequence[TokenizedExample]) -> np.ndarray[Any, np.dtype[np.float64]]:
        return predict(self.base.model, self.base, examples, self.evaluation).scores

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.base.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def generator_of(
    name: str | None, model: ModelSettings, evaluation: EvaluationSettings, answer_tokens: int
) -> Generator | None:
    """The generator that a recipe names, loaded as the encoder was; None where it names none."""
    if name is None:
        return None
    settings = model.model_copy(update={"base": name, "revision": None})
    return Generator(settings, evaluation, answer_tokens)
