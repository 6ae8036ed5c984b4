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


def test_a_converged_model_leaves_out_no_client_with_a_hard_example() -> None:
    """The measure is that of the rounds in which all clients learnt."""
    rows = [{"norms": {f"{i}": 1.0 + i / 10 for i in range(8)}, "steps": {f"{i}": 1 for i in range(8)}}]
    rows += [{"norms": {f"{i}": 1e-3 for i in range(8)}, "steps": {f"{i}": 1 for i in range(8)}}] * 3
    resumed = NormGate(AggregationSettings(), rows)
    live = NormGate(AggregationSettings())
    for row in rows:
        assert passed(live, **row["norms"]) == list(row["norms"])
    for gate in (live, resumed):
        assert passed(gate, **{"0": 1e-3, "1": 1.9, "2": 134.9}) == ["0", "1", "2"]
        assert passed(gate, **{"3": 135.1, "4": 1e-3}) == ["4"], "a hundred times the first round's median"


def test_changes_of_a_round_under_way_set_no_lasting_measure() -> None:
    """Two large changes that come first are the measure of that moment alone."""
    gate = NormGate(AggregationSettings())
    first = {"a": 900.0, "b": 900.0, **{f"{i}": 1.0 for i in range(6)}}
    assert passed(gate, **first) == list(first)
    assert passed(gate, **{"0": 1.0, "a": 150.0}) == ["0"]


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
