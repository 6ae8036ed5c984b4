"""Hidden rows: the batches and the noised sums of a client with ``privacy.unit = "example"``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...core.errors import UpdateError
from ...core.tensors import Tensors
from ...data.tokens import TokenizedExample
from ...privacy.example_mechanism import ExamplePrivacy, Releases, RowPrivacy
from ..messages import Work
from ..protocol import Memory, Values

STEPS, HEAD_FITS = "private_steps", "private_head_fits"
"""The numbers in a client's memory of the noised steps that it has made, and of the fits of the head that it
sent noised sums for."""


@dataclass(frozen=True)
class HiddenRows:
    """A client's batches, by index, with the privacy of their steps."""

    batches: list[list[TokenizedExample]]
    privacy: RowPrivacy


def done_of(values: Values) -> Releases:
    """What a client has released so far, by what it remembers."""
    return Releases(int(values.get(STEPS, 0)), int(values.get(HEAD_FITS, 0)))


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
    done, planned = done_of(memory.values).steps, rows.mechanism.planned.steps
    if done + steps > planned:
        raise UpdateError(
            f"privacy.unit = 'example': {done} of {planned} planned steps are done, {steps} more would "
            "exceed the guarantee"
        )
    return HiddenRows([[examples[i] for i in rows.batch(step)] for step in range(steps)], rows)


def noised_sums(
    privacy: ExamplePrivacy, client: str, rows: int, sums: Tensors, memory: Memory, round_number: int
) -> tuple[Tensors, float]:
    """What a client with so many ``rows`` sends of counts and sums by label, and the standard deviation of
    the noise in each number. The client's memory counts it.

    Raises:
        UpdateError: the task asks once more than is planned, which would exceed epsilon.
    """
    own = privacy.begin(client, rows, round_number)
    done, planned = done_of(memory.values).head_fits, own.mechanism.planned.head_fits
    if done >= planned:
        raise UpdateError(
            f"privacy.unit = 'example': sums for the head were sent {done} of {planned} planned times, once "
            "more would exceed the guarantee"
        )
    memory.values[HEAD_FITS] = done + 1
    return own.noised_sums(sums)
