"""Norm gate: leaves out trained changes that are far larger than others, whatever the aggregation rule."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace

from ..aggregation.norm_limit import MAX_NORM, MAX_RATIO, ChangeSize, change_size, too_large
from ..aggregation.settings import AggregationSettings
from ..methods.tuning.messages import TrainUpdate
from ..transport.protocol import Reply
from .run_directory import Row

WINDOW = 64
"""The newest changes with which one is compared."""

NORMS, STEPS = "norms", "steps"
"""Keys of a round's row: the norms of the changes that were merged, and their steps, by client."""


class NormGate:
    """Passes replies on; a change that :func:`~fedcustom.aggregation.norm_limit.too_large` refuses becomes
    the reason why its client is left out.

    Changes are compared with those merged before, in this round and in earlier ones, which ``rows`` tell of
    when a run is resumed.
    """

    def __init__(self, settings: AggregationSettings, rows: Iterable[Row] = ()) -> None:
        self.max_norm = MAX_NORM if settings.max_norm is None else settings.max_norm
        self.max_ratio = MAX_RATIO if settings.max_norm_ratio is None else settings.max_norm_ratio
        self.sizes: deque[ChangeSize] = deque(maxlen=WINDOW)
        for row in rows:
            steps = row.get(STEPS, {})
            self.sizes += [ChangeSize(norm, steps[client]) for client, norm in row.get(NORMS, {}).items()]

    def passed(self, replies: Iterable[Reply], merged: dict[str, ChangeSize]) -> Iterator[Reply]:
        """The replies, one by one; the sizes of the changes that pass are noted in ``merged``."""
        for reply in replies:
            update = reply.update
            if isinstance(update, TrainUpdate) and "updates" in reply.task.contents and update.tensors:
                size = change_size(update.tensors, update.steps)
                state = change_size(reply.task.tensors).norm
                reason = too_large(size, self.sizes, state, max_norm=self.max_norm, max_ratio=self.max_ratio)
                if reason is None:
                    self.sizes.append(size)
                    merged[reply.client] = size
                else:
                    reply = replace(reply, update=None, reason=reason, detail=f"{reason}\n")
            yield reply
            del reply, update  # before the next one comes
