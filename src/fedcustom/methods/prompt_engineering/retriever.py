"""The sentence encoder that finds the nearest texts for a prompt (``method.retriever``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ...core.per_list import PerList
from ...data.encode import input_cut
from ...data.examples import Example, LearningTask
from ...data.truncation import CutTally
from ...models.configuration import context_length
from ...models.embedding import embed
from ...models.load import load_base
from ..tuning.technique import Context
from .answers import nearest
from .scorer import Matrix


class Retriever:
    """A model in the run's precision, whose pooled states are the texts' vectors.

    Raises:
        ModelError: it cannot be loaded.
    """

    def __init__(self, name: str, context: Context) -> None:
        self.context = context
        model = context.model.model_copy(update={"base": name, "revision": None})
        precision = context.base.precision
        self.base = load_base(
            model, LearningTask("classification"), context.seed, head=False, precision=precision
        )
        self._known = PerList[Matrix]()
        self._cut = CutTally()

    @property
    def length(self) -> int:
        """How many tokens of a text it reads."""
        limit = context_length(self.base.model.config) or 512
        return min(limit, self.context.data.max_length)

    def vectors(self, examples: list[Example]) -> Matrix:
        """Unit vectors (texts, width) of a list's texts, computed once a list."""
        if examples not in self._known:
            self._known[examples] = self.vectors_now(examples)
        return self._known[examples]

    def vectors_now(self, examples: Sequence[Example]) -> Matrix:
        """Unit vectors (texts, width) of texts, cut by ``data.truncate`` to what the model reads."""
        cut = input_cut(self.context.data)
        vectors = embed(
            self.base,
            [example.text for example in examples],
            max_length=self.length,
            batch_size=self.context.evaluation.batch_size,
            how=replace(cut.how, side=cut.how.side or cut.side),
            fields=[example.fields for example in examples],
            tally=self._cut,
        )
        return vectors.astype(np.float64)

    def take_cuts(self) -> list[str]:
        """How many texts were cut since the last call, in a sentence; nothing where none was."""
        cut, self._cut = self._cut, CutTally()
        return [
            f"method.retriever reads {self.length} tokens of a text; cut were {text}"
            for text in cut.in_words("texts")
        ]


def nearest_texts(
    queries: Matrix, texts: Matrix, count: int, *, exclude_self: bool = False
) -> tuple[list[list[int]], Matrix]:
    """Positions of the nearest of ``texts`` (texts, width) to each of ``queries`` (queries, width), nearest
    last, and their mean similarity to each query. ``exclude_self``: the queries are the texts, and none is
    near itself.
    """
    scores = queries @ texts.T
    if exclude_self:
        np.fill_diagonal(scores, -np.inf)
    count = min(count, texts.shape[0] - exclude_self)
    if count < 1:
        return [[] for _ in queries], np.zeros(len(queries))
    order = nearest(scores, count)
    near: Matrix = np.take_along_axis(scores, order, axis=1).mean(axis=1)
    return order.tolist(), near
