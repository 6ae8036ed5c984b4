"""The objective of preference pairs: direct preference optimisation against the base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...data.examples import Example
from ...data.settings import DataSettings
from ...data.tokens import Batch, TokenizedExample, paired
from ...evaluation.settings import EvaluationSettings
from ...models.inference import Predictions, Scores
from ...models.load import Base
from ...models.preference import REFERENCE, collate_pairs, pair_likelihoods, score_pairs
from ...training.dpo import DPO
from .objective import Supervised
from .reference_model import ReferenceModel


class Preference:
    """Losses of pairs of answers (:class:`~fedcustom.training.dpo.DPO`).

    What the reference model makes of a pair is computed once, when the pair is tokenised, in batches of
    ``batch_size`` pairs. So a pair costs two forward passes more in all, and none in each step.
    """

    separable = True
    one_pass = False

    def __init__(
        self, base: Base, data: DataSettings, loss: DPO, reference: ReferenceModel, batch_size: int
    ) -> None:
        self.base, self.dpo, self.reference, self.batch_size = base, loss, reference, batch_size
        self.single = Supervised(base, data)

    def tokens(self, examples: Sequence[Example]) -> list[TokenizedExample]:
        """The pairs' tokens, with what the reference model makes of them. An example that is a prompt alone
        has no pair.
        """
        rows = paired(examples, self.single.tokens)
        if not (places := [place for place, row in enumerate(rows) if row.rejected is not None]):
            return rows
        with self.reference.in_place() as model:
            scores = score_pairs(model, self.base, [rows[i] for i in places], self.batch_size)
        for place, (chosen, rejected) in zip(places, scores.tolist(), strict=True):
            row = rows[place]
            assert row.rejected is not None
            rows[place] = replace(row, rejected=replace(row.rejected, reference=(chosen, rejected)))
        return rows

    def collate(self, examples: Sequence[TokenizedExample]) -> Batch:
        """One batch of pairs."""
        return collate_pairs(examples, self.base)

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """The mean over pairs."""
        return self.row_losses(model, batch).mean()

    def row_losses(self, model: Any, batch: Batch) -> Tensor:
        """Each pair's loss."""
        likelihoods = pair_likelihoods(model, batch, self.base)
        return self.dpo.losses(self.dpo.margins(likelihoods, batch[REFERENCE]))

    def units(self, example: TokenizedExample) -> int:
        """One: a pair."""
        return 1

    def predict(
        self, model: Any, examples: Sequence[TokenizedExample], settings: EvaluationSettings, *, texts: bool
    ) -> Predictions:
        """Loss, reward margin and difference of log-likelihoods of each pair; of prompts alone, what the
        model writes.
        """
        if any(example.rejected is None for example in examples):
            return self.single.predict(model, examples, settings, texts=texts)
        found: Scores = score_pairs(model, self.base, examples, settings.batch_size)
        likelihoods = torch.from_numpy(found)
        reference = [example.rejected.reference for example in examples if example.rejected is not None]
        margins = self.dpo.margins(likelihoods, torch.tensor(reference, dtype=torch.float64).view(-1, 2))
        likelier = likelihoods[:, 0] - likelihoods[:, 1]
        return Predictions(torch.stack([self.dpo.losses(margins), margins, likelier], dim=1).numpy())
