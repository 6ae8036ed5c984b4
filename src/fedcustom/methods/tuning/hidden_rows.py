"""Hidden rows: the batches of a client with ``privacy.unit = "example"``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...core.errors import UpdateError
from ...data.tokens import TokenizedExample
from ...privacy.example_mechanism import ExamplePrivacy, RowPrivacy
from ..protocol import Memory, Work

STEPS = "private_steps"
"""The number in a client's memory of the noised steps that it has made."""


@dataclass(frozen=True)
class HiddenRows:
    """A client's batches, by index, with the privacy of their steps."""

    batches: list[list[TokenizedExample]]
    privacy: RowPrivacy


def steps_of(work: Work, rows: int, batch_size: int) -> int:
    """How many optimiser steps a client with so many ``rows`` makes of a task. Unlike the steps over shuffled
    passes, they do not depend on where the last task ended.
    """
    if work.steps is not None:
        return work.steps
    seen = work.examples
    if seen is None:
        seen = max(1, round((1 if work.epochs is None else work.epochs) * rows))
    return math.ceil(seen / batch_size)


def hidden_rows(
    privacy: ExamplePrivacy,
    client: str,
    examples: Sequence[TokenizedExample],
    memory: Memory,
    work: Work,
    round_number: int,
) -> HiddenRows:
    """What a client's task is done with: batches that a key of its own draws (Poisson sampling).

    Raises:
        UpdateError: the task asks for more steps than are planned, which would exceed epsilon.
    """
    steps = steps_of(work, len(examples), privacy.batch_size)
    rows = privacy.begin(client, len(examples), round_number)
    done, planned = int(memory.values.get(STEPS, 0)), rows.mechanism.steps
    if done + steps > planned:
        raise UpdateError(
            f"privacy.unit = 'example': {done} of {planned} planned steps are done, {steps} more would "
            "exceed the guarantee"
        )
    return HiddenRows([[examples[i] for i in rows.batch(step)] for step in range(steps)], rows)
