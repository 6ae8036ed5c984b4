"""Methods on language models that know a language: attention with and without grouped queries."""

from __future__ import annotations

import math

import pytest

from fedcustom.data.examples import ClientData
from fedcustom.methods import Client, Work
from fedcustom.methods.tuning.messages import TrainUpdate
from helpers.methods import SETTINGS, generation_examples, make
from helpers.smollm2 import needs_smollm2

pytestmark = pytest.mark.slow

NAMES = ("lora", "prefix memory", "prefix", "full", "adapter", "ia3", "bitfit", "soft_prompt")
"""``prefix`` is of key-value pairs."""


@pytest.mark.parametrize("base", ["builtin:lm", pytest.param("builtin:smollm2", marks=needs_smollm2)])
@pytest.mark.parametrize("name", NAMES)
def test_two_steps_have_finite_losses(base: str, name: str) -> None:
    rate = 1e-4 if name == "full" else 1e-3
    method = make(base, name.split()[0], "generation", training={"learning_rate": rate}, **SETTINGS[name])
    client = Client("a", ClientData("a", generation_examples(8)))
    task = method.configure(method.initialise(), 1, {"a": Work(steps=2)})["a"]
    update = method.execute(task, client)
    method.check(task, update)
    assert isinstance(update, TrainUpdate)
    assert update.steps == 2
    assert math.isfinite(update.loss)
    assert 0 < update.loss < 12
    assert all(bool(tensor.isfinite().all()) for tensor in update.tensors.values())
    assert any(bool(tensor.any()) for tensor in update.tensors.values())
