"""The norm gate over rounds: whose changes are the measure of others."""

from __future__ import annotations

import pytest
import torch

from fedcustom.aggregation.settings import AggregationSettings
from fedcustom.federated.norm_gate import WINDOW, NormGate
from fedcustom.methods.tuning.messages import TrainTask, TrainUpdate
from fedcustom.transport.protocol import Reply

TASK = TrainTask({"w": torch.full((4,), 5.0)}, round_number=1)


def reply(client: str, norm: float) -> Reply:
    tensors = {"w": torch.tensor([norm, 0.0, 0.0, 0.0])}
    return Reply(client, TASK, TrainUpdate(tensors, 4.0, loss=1.0, examples=4, steps=1), "", "", 0, 0, 0.0)


def passed(gate: NormGate, **norms: float) -> list[str]:
    return [
        r.client for r in gate.passed([reply(*each) for each in norms.items()], {}) if r.update is not None
    ]


@pytest.mark.parametrize("tiny", [1e-12, 1e-6])
@pytest.mark.parametrize("first", [True, False])
def test_one_of_two_clients_cannot_become_the_measure_of_both(tiny: float, first: bool) -> None:
    """By answering with changes of hardly any length, before or after the other."""
    gate = NormGate(AggregationSettings())
    for _ in range(10):
        norms = {"a": tiny, "b": 1.0} if first else {"a": 1.0, "b": tiny}
        assert passed(gate, **norms) == ["a", "b"]


def test_one_of_three_neither_drives_out_the_others_nor_is_let_in() -> None:
    gate = NormGate(AggregationSettings())
    for _ in range(10):
        assert passed(gate, a=1e-9, b=1.0, c=1.1) == ["a", "b", "c"]
    assert passed(gate, a=200.0, b=1.0, c=1.1) == ["b", "c"]


def test_a_resumed_run_has_the_same_measure() -> None:
    rows = [
        {"norms": {"a": 1.0, "b": 2.0}, "steps": {"a": 1, "b": 1}},
        {"norms": {"c": 3.0}, "steps": {"c": 1}},
        {},
    ]
    gate = NormGate(AggregationSettings(), rows)
    assert passed(gate, a=201.0, d=199.0, b=1.0) == ["d", "b"]
    many = [{"norms": {f"{i}": 1.0}, "steps": {f"{i}": 1}} for i in range(100)]
    assert list(NormGate(AggregationSettings(), many).sizes) == [f"{i}" for i in range(100 - WINDOW, 100)]
