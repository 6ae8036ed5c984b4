"""Sums for a head that a client noises itself: how far a row moves them, what leaves, and how often."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcustom.core.errors import UpdateError, WireError
from fedcustom.methods import Answer, Client, State, WeightTuning, Work
from fedcustom.methods.tuning import head_client
from fedcustom.methods.tuning.head_messages import POINT, check_private_sums, private_sums
from fedcustom.methods.tuning.head_solution import private_head
from fedcustom.methods.tuning.hidden_rows import HEAD_FITS, STEPS
from fedcustom.methods.tuning.messages import HeadGradientTask, HeadSumsUpdate, ScaleHeadTask
from fedcustom.methods.tuning.summed_head import SumTerms
from fedcustom.privacy.accounting import gaussian_mu
from fedcustom.privacy.example_mechanism import ROW_NORM, ExamplePrivacy, Releases
from fedcustom.privacy.secure_sum.integers import zeros
from fedcustom.privacy.secure_sum.terms import Terms
from fedcustom.privacy.settings import PrivacySettings
from fedcustom.transport.messages import read_update, values_of
from fedcustom.transport.secure import ChangeVector
from fedcustom.transport.summed import Summation
from helpers.methods import make, skewed

SECTION: dict[str, Any] = {"unit": "example", "epsilon": 8.0, "delta": 1e-3}


def method_of(path: str, sum_terms: SumTerms | None = None, **more: Any) -> WeightTuning:
    section = PrivacySettings(**{**SECTION, **more})
    privacy = ExamplePrivacy(section, 4, 0, {name: Releases(4, 1) for name in skewed()})
    training = {"fit_head_rounds": [1], "fit_head_steps": 0, "freeze_head_rounds": 0}
    return make(path, "lora", training=training, clients=3, row_privacy=privacy, sum_terms=sum_terms)


def answers_of(method: WeightTuning, state: State) -> tuple[list[Answer], dict[str, Client]]:
    clients, answers = skewed(), []
    tasks = method.configure(state, 1, {name: Work(epochs=1) for name in clients})
    for name, client in clients.items():
        update = method.execute(tasks[name], client)
        method.check(tasks[name], update)
        answers.append(Answer(name, tasks[name], update))
    return answers, clients


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    place=st.integers(0, 5),
    size=st.sampled_from([0.0, 1e-30, 1.0, 1e30, math.inf, -math.inf, math.nan]),
    one=st.booleans(),
)
def test_a_row_moves_all_sums_together_by_its_norm(seed: int, place: int, size: float, one: bool) -> None:
    """Whatever its vector is, one number of it or all; and no sum is ever not finite."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(6, 5, generator=generator)
    labels = torch.randint(0, 3, (6,), generator=generator)
    vectors[place, : 1 if one else 5] *= size
    with_row = private_sums(vectors, labels, 3)
    others = torch.arange(6) != place
    without = private_sums(vectors[others], labels[others], 3)
    moved = torch.cat([(with_row[name] - without[name]).flatten().double() for name in with_row])
    assert float(moved.norm()) <= ROW_NORM * (1 + 1e-5)
    assert float(with_row["counts"].sum() - without["counts"].sum()) == 1


def test_nothing_leaves_but_noised_counts_and_sums(sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows are in them, also those of labels with few texts, which are withheld without noise."""
    method = method_of(sentence)
    true: list[Any] = []
    plain = head_client.private_sums
    monkeypatch.setattr(head_client, "private_sums", lambda *given: true.append(plain(*given)) or true[-1])
    answers, clients = answers_of(method, method.initialise())
    noise = math.sqrt(2) / (math.sqrt(0.13) * gaussian_mu(8.0, 1e-3))
    for answer, sums in zip(answers, true, strict=True):
        update = answer.update
        assert isinstance(update, HeadSumsUpdate)
        assert set(update.tensors) == {"counts", "totals"}
        own = clients[answer.client]
        assert update.weight == len(own.data.train) == float(sums["counts"].sum())
        assert update.deviation == pytest.approx(noise)
        assert values_of(update).keys() == {"weight", "deviation"}
        assert set(own.memory.values) == {HEAD_FITS}
        assert not own.memory.tensors
        for name, tensor in sums.items():
            difference = (update.tensors[name] - tensor).double()
            assert bool((difference != 0).all()), name
            assert float(difference.abs().max()) < 9 * noise
    every = torch.cat(
        [
            (answer.update.tensors["totals"] - sums["totals"]).flatten()
            for answer, sums in zip(answers, true, strict=True)
        ]
    )
    assert float(every.std()) == pytest.approx(noise, rel=5 / math.sqrt(2 * len(every)))


def test_a_fit_that_is_asked_for_again_has_other_noise_or_none(sentence: str) -> None:
    method = method_of(sentence)
    state = method.initialise()
    first, clients = answers_of(method, state)
    task, client = first[0].task, clients[first[0].client]
    with pytest.raises(UpdateError, match="were sent 1 of 1 planned times, once more would exceed"):
        method.execute(task, client)
    del client.memory.values[HEAD_FITS]  # the server went back to the beginning, and the client with it
    again = method.execute(task, client)
    assert not torch.equal(again.tensors["counts"], first[0].update.tensors["counts"])
    assert STEPS not in client.memory.values


@pytest.mark.parametrize("kind", [ScaleHeadTask, HeadGradientTask])
def test_no_losses_and_no_gradients_follow(sentence: str, kind: Any) -> None:
    """Whatever a server asks: a client that sent noised sums keeps no vectors to answer from."""
    method = method_of(sentence)
    answers, clients = answers_of(method, method.initialise())
    layer = method.head_fit.layer
    task = kind({POINT: torch.zeros(layer.classes, layer.width + 1)}, round_number=1)
    with pytest.raises(UpdateError, match="vectors of this round are gone"):
        method.execute(task, clients[answers[0].client])


def test_the_server_solves_for_the_noise_of_those_who_answered(sentence: str) -> None:
    method = method_of(sentence)
    state = method.initialise()
    answers, _ = answers_of(method, state)
    found = method.aggregate(state, answers[:2])
    counts, totals = (
        answers[0].update.tensors[name].double() + answers[1].update.tensors[name].double()
        for name in ("counts", "totals")
    )
    deviation = math.hypot(*(answer.update.deviation for answer in answers[:2]))  # type: ignore[attr-defined]
    expected = private_head(method.head_fit.layer, counts, totals, deviation)
    for name, tensor in expected.items():
        assert torch.allclose(found.state.tensors[name], tensor)
    assert "noised sums of 2 clients" in found.report["head"]
    assert set(found.state.server) == set(state.server)
    alone = method.aggregate(state, answers[:1])
    assert "not fitted: 1 of 3 clients answered" in alone.report["head"]
    assert alone.state is state


def test_what_no_rows_can_have_given_is_refused(sentence: str) -> None:
    method = method_of(sentence)
    answers, _ = answers_of(method, method.initialise())
    task, update = answers[0].task, answers[0].update
    again = read_update(method.messages, task, values_of(update), update.tensors)
    method.check(task, again)
    counts = update.tensors["counts"]
    for change in (
        {"deviation": None},
        {"deviation": 0.0},
        {"deviation": math.inf},
        {"weight": 0.5},
        {"weight": 0.0},
        {"tensors": {**update.tensors, "counts": counts + 1e4}},
        {"tensors": {**update.tensors, "counts": torch.full_like(counts, math.nan)}},
        {"tensors": {**update.tensors, "factor": torch.zeros(3)}},
        {"tensors": {"counts": counts}},
    ):
        with pytest.raises(UpdateError):
            method.check(task, replace(update, **change))  # type: ignore[arg-type]
    with pytest.raises(WireError, match="deviation"):
        read_update(method.messages, task, {**values_of(update), "deviation": math.nan}, update.tensors)
    with pytest.raises(UpdateError, match="sums are not noised by the client"):
        check_private_sums(update, 3, update.tensors["totals"].shape[1])


def test_under_secure_sums_the_server_sees_their_sum(sentence: str) -> None:
    """The same head, to rounding, of sums with the same noise; and nothing follows."""
    plain = method_of(sentence, randomness="seeded")
    wanted = plain.aggregate(plain.initialise(), answers_of(plain, plain.initialise())[0])
    method = method_of(sentence, SumTerms(), randomness="seeded")
    assert [kind for kind in method.messages if kind != "train"] == ["sum noised vectors"]
    state = method.initialise()
    answers, clients = answers_of(method, state)
    vector = Summation.of(method, ChangeVector(16.0, 3, None, 0), Terms()).vector(answers[0].task)
    total = zeros(vector.length, vector.bits)
    for answer in answers:
        total = total + vector.encode(answer.update, answer.client, 3)
    reply = vector.opened(total, tuple(clients))
    assert reply.update is not None
    assert reply.update.weight == sum(len(client.data.train) for client in clients.values())
    summed = Answer("(sum)", answers[0].task, reply.update, summed=tuple(clients))
    found = method.aggregate(state, iter([summed]))
    assert found.report == wanted.report
    assert found.state.values == wanted.state.values
    for name in method.head_fit.names:
        torch.testing.assert_close(
            found.state.tensors[name], wanted.state.tensors[name], rtol=1e-4, atol=1e-5
        )
    with pytest.raises(UpdateError, match="does not go with"):
        method.execute(HeadGradientTask({POINT: torch.zeros(3, 33)}, round_number=1), clients["a"])
