"""What only a GPU shows: clients in one batch, and quantised bases, on CUDA. Skipped elsewhere.

pytest -m gpu
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedcustom.methods.tuning.messages import TrainUpdate
from helpers.methods import SETTINGS, make
from helpers.quantised import wide_model
from helpers.rounds import distance, rounds

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use"),
]

METHODS = ["lora", "prefix memory", "prefix shifts", "prefix", "adapter", "ia3", "bitfit", "soft_prompt"]
TRAINING = {"batch_size": 3, "clip_norm": 1.0, "optimizer": "sgd", "learning_rate": 0.1}
CLOSE = {"float32": 1e-4, "bfloat16": 2e-2}
"""How far a cohort may be from its clients alone: kernels of other shapes sum in another order."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return wide_model(tmp_path_factory.mktemp("gpu") / "llama", "llama")


def trained(folder: str, name: str, *, together: bool = True, **model: Any) -> list[dict[str, TrainUpdate]]:
    """The updates of two rounds on the GPU, or where ``model`` says."""
    settings = {"device": "cuda", **model}
    method = make(folder, name.split()[0], "generation", model=settings, training=TRAINING, **SETTINGS[name])
    return rounds(method, "generation", together=together)


def farthest(one: list[dict[str, TrainUpdate]], other: list[dict[str, TrainUpdate]]) -> float:
    """The largest distance of two clients' updates."""
    pairs = zip(one, other, strict=True)
    return max(distance(update, after[name]) for before, after in pairs for name, update in before.items())


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("name", METHODS)
def test_together_is_alone(llama: str, name: str, dtype: str) -> None:
    together, alone = (trained(llama, name, together=each, dtype=dtype) for each in (True, False))
    assert farthest(together, alone) < CLOSE[dtype]


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("name", ["lora", "prefix memory"])
def test_a_quantised_base_trains(llama: str, name: str, scheme: str) -> None:
    for updates in trained(llama, name, quantization=scheme):
        for update in updates.values():
            assert all(bool(torch.isfinite(tensor).all()) for tensor in update.tensors.values())


def test_a_gpu_gives_what_a_processor_gives(llama: str) -> None:
    assert farthest(trained(llama, "lora"), trained(llama, "lora", device="cpu")) < 1e-3
