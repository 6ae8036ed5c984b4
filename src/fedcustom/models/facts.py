"""Facts of a base model that defaults of a recipe depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .size_class import ModelKind

if TYPE_CHECKING:  # torch
    from .pooling import PoolingName


@dataclass(frozen=True)
class ModelFacts:
    """What a model's configuration says, without its weights (:func:`~.configuration.read_facts`).

    ``linear_head`` says whether a classifier on it is known to end in a linear layer with a bias. ``pooling``
    and ``normalize`` are a classifier's pooling; None: its architecture's own head.
    """

    kind: ModelKind
    linear_head: bool = False
    pooling: PoolingName | None = None
    normalize: bool | None = None
