"""Vectors of questions, of chunks of documents, and of passages as training sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...data.encode import encode_examples, input_cut
from ...data.examples import Example
from ...data.settings import DataSettings
from ...data.truncation import CutTally
from ...models.embedding import embed
from ...models.load import Base
from .privacy import Vectors


class Embedder:
    """The encoder of a search, with the lengths at which its three kinds of texts are cut. Questions are cut
    as training cuts them (``data.truncate``), all other texts lose their end.

    Args:
        encoder: the model, with the tensors that it is to embed with.
        data: the recipe's section on data, for lengths and truncation.
        chunk_length: longest chunk of a document, in tokens.
        batch_size: texts of a pass on a GPU.
    """

    def __init__(self, encoder: Base, data: DataSettings, chunk_length: int, batch_size: int) -> None:
        self.encoder, self.data, self.batch_size = encoder, data, batch_size
        self.longest_chunk = max(chunk_length + 2, data.max_length)
        self._known: dict[str, Example] = {}  # questions with their columns
        self._chunks = CutTally()

    def know(self, questions: Sequence[Example]) -> None:
        """Remember the columns of these questions, and of no others."""
        self._known = {question.text: question for question in questions}

    def question(self, text: str) -> Example:
        """A question, with its columns where they are known: one that is typed has none."""
        return self._known.get(text, Example(text))

    def cut_of(self, text: str) -> int:
        """How many tokens of a question are cut before it is embedded."""
        base, question = self.encoder, self.question(text)
        (encoded,) = encode_examples(base.tokenizer, [question], input_cut(self.data), base.token_rules)
        return sum(encoded.lost.values())

    def typed_questions(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors of questions of which only the texts are given, (questions, width)."""
        return self.questions([self.question(text) for text in texts])

    def questions(self, questions: Sequence[Example]) -> Vectors:
        """Unit vectors of questions, (questions, width)."""
        return embed(
            self.encoder,
            [question.text for question in questions],
            max_length=self.data.max_length,
            batch_size=self.batch_size,
            how=self.data.truncation,
            fields=[question.fields for question in questions],
        )

    def chunks(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors of chunks of documents, (chunks, width); what is cut of them is counted."""
        size, longest = self.batch_size, self.longest_chunk
        return embed(self.encoder, texts, max_length=longest, batch_size=size, tally=self._chunks)

    def passages(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors of passages as training sees them, (passages, width)."""
        longest = self.data.max_target_length
        return embed(self.encoder, texts, max_length=longest, batch_size=self.batch_size)

    def ranks(self, examples: Sequence[Example]) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The rank, from 1, of each question's own passage among those of the examples, (examples,)."""
        questions = self.questions(examples)
        texts = list(dict.fromkeys(example.target for example in examples))
        vectors = self.passages(texts)
        place = {text: number for number, text in enumerate(texts)}
        own = np.array([place[example.target] for example in examples])
        scores = questions @ vectors.T
        better = (scores > scores[np.arange(len(own)), own][:, None]).sum(axis=1)
        ranks: np.ndarray[Any, np.dtype[np.float64]] = better + 1.0
        return ranks

    def take_cuts(self) -> list[str]:
        """What of chunks the encoder had no room for, since the last call."""
        chunks, self._chunks = self._chunks, CutTally()
        return [f"the encoder cut {text}" for text in chunks.in_words("chunks of documents")]
