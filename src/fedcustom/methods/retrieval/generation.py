"""Answers generated from passages, and the likelihood of reference answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...core.errors import ModelError
from ...data.encode import AUTOMATIC, Cut, shorten
from ...data.examples import Example, LearningTask
from ...data.tokens import TokenizedExample
from ...data.truncation import CutTally, Truncation
from ...evaluation.settings import EvaluationSettings
from ...models.configuration import context_length
from ...models.inference import generate, predict
from ...models.load import Base, load_base
from ...models.precision import Precision
from ...models.settings import ModelSettings


class Generator:
    """A language model that is given passages and a question: a decoder with a chat template as a user's
    turn, any other as plain text that ends in ``Answer:``.

    Passages and questions are read as text: the name of a control token in them is no control token.

    What does not fit its context is cut, and counted until :meth:`take_cuts`: a passage and a reference
    answer lose their end, a question loses what ``how`` says (``data.truncate``).
    """

    def __init__(
        self,
        model: ModelSettings,
        evaluation: EvaluationSettings,
        answer_tokens: int,
        how: Truncation = AUTOMATIC,
        precision: Precision | None = None,
    ) -> None:
        """Load the model; with ``model.dtype = "auto"`` in this ``precision``, or else in the faster here.

        Raises:
            ModelError: it cannot be loaded, or its context is too short.
        """
        self.base: Base = as_assistant(load_base(model, LearningTask("generation"), 0, precision=precision))
        chat = self.base.chat
        self._before, self._after = chat.around_a_turn() if chat is not None else ([], [])
        self.answer_tokens, self.how = answer_tokens, how
        self._questions, self._passages, self._answers = CutTally(), CutTally(), CutTally()
        self._space = "" if chat is not None else " "  # before an answer
        self.evaluation = evaluation.model_copy(update={"max_new_tokens": answer_tokens})
        limit = context_length(self.base.model.config)
        self.room = (limit or 4096) - answer_tokens - len(self._before) - len(self._after)
        if self.room < 32:
            raise ModelError(
                f"method.answer_tokens = {answer_tokens}: {model.base} has a context of {limit} positions, "
                "which leaves no room for a question"
            )

    def write(self, questions: Sequence[Example], passages: Sequence[Sequence[str]]) -> list[str]:
        """An answer to each question, from its passages."""
        sources = [
            np.asarray(self.prompt(question, given), dtype=np.int32)
            for question, given in zip(questions, passages, strict=True)
        ]
        return generate(self.base.model, self.base, sources, self.evaluation)

    def loss(
        self, questions: Sequence[Example], passages: Sequence[Sequence[str]], answers: Sequence[str]
    ) -> float:
        """Loss per token (nats) of the beginnings of reference answers after question and passages."""
        examples = []
        for question, given, answer in zip(questions, passages, answers, strict=True):
            target = self._beginning(self._space + answer, self.answer_tokens, self._answers)
            examples.append(TokenizedExample.of(self.prompt(question, given), target))
        scores = self._scores(examples)
        return float(scores[:, 0].sum() / scores[:, 1].sum())

    def likelihood(self, question: Example, passages: Sequence[str]) -> list[float]:
        """Mean log-probability of the question's tokens after each passage (UPR, Sachan et al. 2022)."""
        target = self._asked(" ", question, "", self.room // 2)
        examples = []
        for passage in passages:
            ending = self._ids("\nQuestion:")
            room = self.room - len(target) - len(ending)
            source = self._beginning(passage, room, self._passages) + ending
            examples.append(TokenizedExample.of(source, target))
        scores = self._scores(examples)
        return [float(-total / count) for total, count in scores]

    def prompt(self, question: Example, passages: Sequence[str]) -> list[int]:
        """Tokens of numbered passages and the question; passages are cut such that all fits the context."""
        ending = self._asked("Question: ", question, "" if self.base.chat else "\nAnswer:", self.room)
        room = self.room - len(ending)
        each = room // max(1, len(passages))
        ids: list[int] = []
        for number, passage in enumerate(passages, start=1):
            ids += self._beginning(f"[{number}] {passage}", max(0, each - 2), self._passages)
            ids += self._ids("\n")
        return [*self._before, *ids[:room], *ending, *self._after]

    def take_cuts(self) -> list[str]:
        """What was cut to fit the context since the last call, in a sentence; nothing where all did fit."""
        tallies = {
            "questions": self._questions,
            "passages": self._passages,
            "reference answers": self._answers,
        }
        self._questions, self._passages, self._answers = CutTally(), CutTally(), CutTally()
        found = [text for what, tally in tallies.items() for text in tally.in_words(what)]
        room = f"{self.room} tokens and {self.answer_tokens} of an answer"
        return [f"{self.base.name} reads {room}; cut were {', '.join(found)}"] if found else []

    def _asked(self, before: str, question: Example, after: str, room: int) -> list[int]:
        """Tokens of a question between two texts, of which it alone is cut."""
        ids = self._ids(before + question.text + after)
        if len(ids) <= room:
            self._questions.add(0)
            return ids
        limit, lost = room - len(self._ids(before + after)), 0
        while len(ids) > room and limit > 0:
            ((text, cut),) = shorten(self.base.tokenizer, [question], Cut(limit, self.how))
            ids, lost, limit = self._ids(before + text + after), sum(cut.values()), limit - 1
        self._questions.add(lost)
        return ids[-room:]

    def _beginning(self, text: str, room: int, tally: CutTally) -> list[int]:
        """The first tokens of a text, as many as there is room for; the others are counted."""
        ids = self._ids(text)
        tally.add(max(0, len(ids) - room))
        return ids[:room]

    def _scores(self, examples: Sequence[TokenizedExample]) -> np.ndarray[Any, np.dtype[np.float64]]:
        return predict(self.base.model, self.base, examples, self.evaluation).scores

    def _ids(self, text: str) -> list[int]:
        made = self.base.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return list(made["input_ids"])


def as_assistant(base: Base) -> Base:
    """The model as one that answers in conversations, where it is a decoder with a chat template."""
    if base.architecture != "decoder" or not base.tokenizer.chat_template or not base.tokenizer.is_fast:
        return base
    return replace(base, task=replace(base.task, chat=True))


def generator_of(
    name: str | None,
    model: ModelSettings,
    evaluation: EvaluationSettings,
    answer_tokens: int,
    how: Truncation = AUTOMATIC,
    precision: Precision | None = None,
) -> Generator | None:
    """The generator that a recipe names, loaded as the encoder was, in its ``precision``; None where it names
    none.
    """
    if name is None:
        return None
    settings = model.model_copy(update={"base": name, "revision": None})
    return Generator(settings, evaluation, answer_tokens, how, precision)
