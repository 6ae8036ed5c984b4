"""Distillation losses, and the order of texts in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ...data.tokens import example_order
from ...models.load import Base
from ...models.size_class import kind_of
from ...training.settings import TrainingSettings
from .packing import Integers
from .settings import DistillationSettings

Student = Literal["server", "client"]


def teaching(
    settings: DistillationSettings, training: TrainingSettings, student: Student, base: Base
) -> TrainingSettings:
    """How the server, whose model is ``base``, or a client learns from a teacher: as clients train,
    but for the server's rate.
    """
    if student == "client":
        return training
    usual = settings.tuning(settings.server_method).default_learning_rate(kind_of(base.model.config))
    rate = settings.server_learning_rate or usual
    return training.model_copy(update={"learning_rate": rate, "head_learning_rate": None})


def text_batches(texts: Integers, epochs: int, size: int, seed: Sequence[int]) -> Iterator[Integers]:
    """Where in ``texts`` a batch's members are: every text once an epoch, in an order drawn by the seed."""
    count = len(texts)
    for epoch in range(epochs):
        order = np.array(example_order(count, epoch * count, (epoch + 1) * count, seed), dtype=np.int64)
        for start in range(0, count, size):
            yield order[start : start + size]


def divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(teacher || softmax(z / T))``, mean over rows (Hinton et al. 2015); T^2 keeps gradients as
    large as they are at T = 1.

    ``logits`` z and ``teacher`` (its probabilities at T) are (rows, labels).
    """
    student = functional.log_softmax(logits / temperature, dim=1)
    return temperature**2 * functional.kl_div(student, teacher, reduction="batchmean")


def top_k_divergence(logits: Tensor, labels: Tensor, probabilities: Tensor) -> Tensor:
    """``KL(teacher || student)`` of each row where of the teacher only some labels' probabilities are known:
    those labels apart, and all others as one (rows,).

    ``logits`` is (rows, vocabulary); ``labels`` and ``probabilities`` are (rows, k), no label twice but with
    probability 0. The student's mass of all other labels counts as 1e-6 at least, so that a row's loss is
    finite. But for that, by the log-sum inequality it is at most the divergence over the whole vocabulary.
    """
    student = functional.log_softmax(logits, dim=1)
    known = student.gather(1, labels)
    given = probabilities > 0
    rest = (1 - probabilities.sum(1)).clamp(min=0)
    covered = torch.where(given, known.exp(), 0).sum(1)
    left = torch.log((1 - covered).clamp(min=1e-6))
    inner = torch.special.xlogy(probabilities, probabilities) - torch.where(given, probabilities * known, 0)
    result: Tensor = inner.sum(1) + torch.special.xlogy(rest, rest) - rest * left
    return result
