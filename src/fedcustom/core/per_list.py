"""Values of lists, computed once a list."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

V = TypeVar("V")

MOST_LISTS = 10_000
"""Lists whose values are kept: more than a run has, fewer than a server of a model is asked about."""


class PerList(Generic[V]):
    """What was computed of lists, which must not change. Of more than ``most``, the oldest are forgotten.

    A list is kept alive with its value, so that no other list can have its id.
    """

    def __init__(self, most: int = MOST_LISTS) -> None:
        self._most = most
        self._kept: dict[int, tuple[list[Any], V]] = {}

    def __contains__(self, items: object) -> bool:
        return id(items) in self._kept

    def __getitem__(self, items: list[Any]) -> V:
        return self._kept[id(items)][1]

    def __setitem__(self, items: list[Any], value: V) -> None:
        self._kept[id(items)] = (items, value)
        while len(self._kept) > self._most:
            del self._kept[next(iter(self._kept))]
