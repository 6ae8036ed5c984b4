"""Translation of a teacher's next-token probabilities to a student with another tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data.tokens import Batch
from ...models.inference import to_device
from .alignment import VocabularyMap, align, map_rows, one_to_one
from .language_models import Speaker
from .packing import Floats, Integers, TopK


@dataclass(frozen=True)
class Lesson:
    """What a teacher says of one text, in the student's tokens.

    At each place from the second token on: ``labels`` and ``probabilities`` of (places, k), and whether the
    teacher has a say there at all (``valid``). ``loss`` is the teacher's mean loss (nats a token) where it
    has, ``own_loss`` the student's at the same places.
    """

    labels: Integers
    probabilities: Floats
    valid: np.ndarray[Any, np.dtype[np.bool_]]
    loss: float
    own_loss: float


class Translator:
    """A teacher's rows in a student's tokens, aligned as in FedMKT."""

    def __init__(self, teacher: Speaker, student: Speaker) -> None:
        self.teacher, self.student = teacher, student
        same = teacher.vocabulary == student.vocabulary
        self.mapping = None if same else VocabularyMap(teacher.vocabulary, student.vocabulary)
        self._partners: dict[int, Integers] = {}

    def lesson(self, text: int, rows: TopK, own_losses: Floats) -> Lesson:
        """What the teacher's rows of a text say to the student, whose own losses at its places are known."""
        partners = self.partners(text)
        valid = partners >= 0
        labels, probabilities = rows.labels[partners], rows.probabilities[partners]
        if self.mapping is not None:
            labels, probabilities = map_rows(labels, probabilities, self.mapping)
        probabilities = np.where(valid[:, None], probabilities, 0.0)
        if not valid.any():
            return Lesson(labels, probabilities, valid, np.inf, np.inf)
        loss = observed_losses(
            labels, probabilities, self.student.texts[text][1:].astype(np.int64), self.student.format.labels
        )
        return Lesson(
            labels, probabilities, valid, float(loss[valid].mean()), float(own_losses[valid].mean())
        )

    def partners(self, text: int) -> Integers:
        """For each of the student's places the teacher's row that speaks of the same token; -1 where there
        is none.
        """
        if text not in self._partners:
            self._partners[text] = self._partner(text)
        return self._partners[text]

    def _partner(self, text: int) -> Integers:
        theirs, ours = self.teacher.plain(text), self.student.plain(text)
        if self.mapping is None:
            return np.arange(self.student.places(text))
        pieces = [
            [speaker.vocabulary.pieces[speaker.texts[text][i]] for i in positions]
            for speaker, positions in ((self.teacher, theirs), (self.student, ours))
        ]
        partner = np.full(len(self.student.texts[text]), -1, dtype=np.int64)
        found = one_to_one(align(*pieces), len(ours))
        partner[ours[found >= 0]] = theirs[found[found >= 0]]
        # The row at place i speaks of token i + 1; a text's first token is not predicted.
        return np.maximum(partner[1:] - 1, -1) if len(partner) else partner


def observed_losses(labels: Integers, probabilities: Floats, observed: Integers, vocabulary: int) -> Floats:
    """``-log p`` (nats) of the observed token in each top-k row; tokens outside it share the rest evenly, and
    a probability is at least 1e-6: (rows,).
    """
    hit = (labels == observed[:, None]) & (probabilities > 0)
    known = np.where(hit, probabilities, 0.0).sum(axis=1)
    rest = np.clip(1 - probabilities.sum(axis=1), 0, 1) / max(1, vocabulary - labels.shape[1])
    losses: Floats = -np.log(np.maximum(np.where(hit.any(axis=1), known, rest), 1e-6))
    return losses


def lesson_batch(student: Speaker, lessons: list[tuple[int, Lesson]]) -> Batch:
    """A batch of texts with, at all places but the last, what the teacher says: ``tokens`` and
    ``probabilities`` of (texts, places, k), ``valid`` of (texts, places).
    """
    batch = student.batch(text for text, _ in lessons)

    def padded(rows: list[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    return batch | to_device(
        {
            "labels": torch.zeros(len(lessons)),
            "tokens": padded([torch.from_numpy(lesson.labels) for _, lesson in lessons]),
            "probabilities": padded(
                [torch.from_numpy(lesson.probabilities).float() for _, lesson in lessons]
            ),
            "valid": padded([torch.from_numpy(lesson.valid) for _, lesson in lessons]),
        },
        student.learner.base.device,
    )
