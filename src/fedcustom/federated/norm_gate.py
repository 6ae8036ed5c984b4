"""Norm gate: leaves out trained changes that are far larger than others, whatever the aggregation rule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

from ..aggregation.norm_limit import (
    FEWEST_TO_COMPARE,
    MAX_NORM,
    MAX_RATIO,
    ChangeSize,
    Median,
    change_size,
    too_large,
)
from ..aggregation.settings import AggregationSettings
from ..methods.messages import ChangeUpdate
from ..methods.tuning.messages import TrainUpdate
from ..transport.protocol import Reply
from .run_directory import Row

WINDOW = 64
"""Clients with whose newest changes one is compared."""

NORMS, STEPS = "norms", "steps"
"""Keys of a round's row: the norms of the changes that were merged, and their steps, by client."""


class NormGate:
    """Passes replies on; a change that :func:`~fedcustom.aggregation.norm_limit.too_large` refuses becomes
    the reason why its client is left out.

    Changes are compared with those merged before, in this round and in earlier ones, which ``rows`` tell of
    when a run is resumed. Of each client the newest one counts, however often it answered: of two clients,
    one that hardly moves would else come to be the measure of both. The measure never falls below what it was
    at the end of an earlier round: once a model has converged, the change of a client with one hard example
    is hundreds of times the median.

    ``alone``: a change is not compared with others, only with ``max_norm``.

    What a client sends in a further exchange of a round of training is held to the same limits, and is not
    itself a measure of others; its steps are those of the training.
    """

    def __init__(
        self, settings: AggregationSettings, rows: Iterable[Row] = (), *, alone: bool = False
    ) -> None:
        self.max_norm = MAX_NORM if settings.max_norm is None else settings.max_norm
        self.max_ratio = MAX_RATIO if settings.max_norm_ratio is None else settings.max_norm_ratio
        self.max_ratio = math.inf if alone else self.max_ratio
        self.sizes: dict[str, ChangeSize] = {}  # the newest last
        self.least = Median()
        for row in rows:
            steps = row.get(STEPS, {})
            for client, norm in row.get(NORMS, {}).items():
                self._note(client, ChangeSize(norm, steps[client]))
            self._end_round()

    def passed(self, replies: Iterable[Reply], merged: dict[str, ChangeSize]) -> Iterator[Reply]:
        """The replies, one by one; the sizes of the changes that pass are noted in ``merged``."""
        self._end_round()
        for reply in replies:
            update = reply.update
            if isinstance(update, ChangeUpdate) and "updates" in reply.task.contents and update.tensors:
                size = change_size(update.tensors, self._steps(reply.client, update))
                others = list(self.sizes.values())
                reason = too_large(
                    size,
                    others,
                    reply.task.tensors,
                    max_norm=self.max_norm,
                    max_ratio=self.max_ratio,
                    least=self.least,
                )
                if reason is None and isinstance(update, TrainUpdate):
                    self._note(reply.client, size)
                    merged[reply.client] = size
                elif reason is not None:
                    reply = replace(reply, update=None, reason=reason, detail=f"{reason}\n")
            yield reply
            del reply, update  # before the next one comes

    def _end_round(self) -> None:
        """Take the last round's measure as the least one from now on, if it is larger than before."""
        if len(self.sizes) >= FEWEST_TO_COMPARE:
            self.least = self.least.largest(Median.of(list(self.sizes.values())))

    def _steps(self, client: str, update: ChangeUpdate) -> int:
        """The optimiser steps that a client's tensors come of."""
        if isinstance(update, TrainUpdate):
            return update.steps
        return self.sizes[client].steps if client in self.sizes else 1

    def _note(self, client: str, size: ChangeSize) -> None:
        self.sizes.pop(client, None)
        self.sizes[client] = size
        if len(self.sizes) > WINDOW:
            del self.sizes[next(iter(self.sizes))]
