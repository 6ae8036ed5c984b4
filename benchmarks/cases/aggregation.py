"""(e) Aggregation: a streaming mean of large updates against a plain copy of the same bytes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from fedcustom.aggregation.mean import weighted_mean

from ..harness import spread


def measure(*, clients: int = 8, tensors: int = 24, numbers: int = 1_000_000, repetitions: int = 7) -> Any:
    """GB/s of updates that go into the mean, of bytes that are copied, and the one over the other."""
    updates = [{f"layer{i}": torch.rand(numbers) for i in range(tensors)} for _ in range(clients)]
    target = {name: torch.empty_like(tensor) for name, tensor in updates[0].items()}
    size = clients * tensors * numbers * 4

    def merge() -> None:
        weighted_mean((update, 1.0 + number) for number, update in enumerate(updates))

    def copy() -> None:
        for update in updates:
            for name, tensor in update.items():
                target[name].copy_(tensor)

    def rate(act: Callable[[], None]) -> float:
        begun = time.perf_counter()
        act()
        return size / (time.perf_counter() - begun) / 1e9

    merge()
    copy()
    pairs = [(rate(merge), rate(copy)) for _ in range(repetitions)]
    return {
        "updates_bytes": size,
        "mean": spread([one for one, _ in pairs]),
        "copy": spread([other for _, other in pairs]),
        "share": spread([one / other for one, other in pairs]),
    }
