"""Runs in one process leave nothing of their models behind."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import fedcustom
from fedcustom.federated.callbacks import Callback
from fedcustom.federated.simulation import gathered
from fedcustom.recipe.recipe import Recipe


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


def test_parties_are_ended_once_and_held_by_nobody(tmp_path: Path) -> None:
    """Also where a run fails; and who lets go of the parties frees them before that."""
    ended: list[str] = []

    class Parties:
        def __init__(self, *given: Any) -> None:
            self.close = lambda: ended.append("ended")

    def fail() -> None:
        with gathered(Parties, Recipe(), tmp_path, tmp_path, Callback()) as parties:  # type: ignore[arg-type]
            known = weakref.ref(parties)
            del parties
            assert known() is None
            assert not ended
            raise RuntimeError("a round fails")

    with pytest.raises(RuntimeError, match="a round fails"):
        fail()
    assert ended == ["ended"]
