"""Parallel passes: several at a time, each on its share of the processor's threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class ParallelPasses:
    """Works on several items at a time, in threads that share torch's threads among them.

    Small matrices keep one thread each busier than all threads together, which wait for one another after
    every operation. Used as a context; afterwards torch has its threads back.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(count, "lane") if count > 1 else None

    def __enter__(self) -> ParallelPasses:
        if self._pool is not None:
            torch.set_num_threads(1)  # what is left to this thread is small; its helpers would wait busily
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self._threads)

    def each(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """The function's results in the order of the items; an error is raised in its item's place."""
        if self._pool is None:
            return map(function, items)
        share = max(1, self._threads // min(self.count, len(items)))

        def on_its_share(item: Item) -> Result:
            torch.get_num_threads()  # else the thread's first operation would set the number anew
            torch.set_num_threads(share)
            return function(item)

        return self._pool.map(on_its_share, items)
