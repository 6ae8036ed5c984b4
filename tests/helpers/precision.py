"""Machines on which one precision or the other is faster."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedcustom.models import precision


def claim(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> list[tuple[int, int]]:
    """Let measurements give these seconds; returns the shapes of batches that were measured."""
    shapes: list[tuple[int, int]] = []

    def measured(model: Any, device: torch.device, rows: int, tokens: int) -> dict[str, float]:
        shapes.append((rows, tokens))
        return seconds

    monkeypatch.setattr(precision, "measure", measured)
    return shapes
