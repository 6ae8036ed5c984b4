"""Check of an aggregate: whether clients can be given the state as the next one to start from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core.bounded_json import MAX_FLOAT, MAX_INTEGER
from ..core.errors import AggregationError
from ..core.tensors import is_finite
from ..methods import State


def check_aggregate(state: State) -> None:
    """Refuse a state that holds numbers that are not finite, or that no party would accept in a message.

    Raises:
        AggregationError: says which.
    """
    if not is_finite(state.tensors) or not is_finite(state.server):
        raise AggregationError("the aggregate holds numbers that are not finite")
    for key, value in state.values.items():
        if not _can_travel(value):
            raise AggregationError(f"the aggregate's {key} holds a number that no message may hold")


def _can_travel(value: Any) -> bool:
    if isinstance(value, float):
        return abs(value) <= MAX_FLOAT
    if isinstance(value, int):
        return -MAX_INTEGER < value < MAX_INTEGER
    if isinstance(value, Mapping):
        return all(map(_can_travel, value.values()))
    return not isinstance(value, list | tuple) or all(map(_can_travel, value))
