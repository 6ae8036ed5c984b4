"""Runs in one process leave nothing of their models behind."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import fedcustom


def tensors() -> Counter[tuple[int, ...]]:
    """How many tensors of each shape there are."""
    gc.collect()
    kinds = (torch.Tensor, torch.nn.Parameter)
    return Counter(tuple(one.shape) for one in gc.get_objects() if type(one) in kinds)


@pytest.mark.parametrize("kind", ["small", "generation"])
@pytest.mark.parametrize("method", ["lora", "prefix", "full", "adapter", "soft_prompt"])
def test_no_tensor_stays(request: pytest.FixtureRequest, tmp_path: Path, method: str, kind: str) -> None:
    recipe: dict[str, Any] = {**request.getfixturevalue(kind), "method": {"name": method}}
    fedcustom.run(recipe, out=tmp_path / "first", check_export=False)  # what is kept once for a process
    before = tensors()
    fedcustom.run(recipe, out=tmp_path / "second", check_export=False)
    assert not tensors() - before
