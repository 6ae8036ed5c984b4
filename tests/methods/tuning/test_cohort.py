"""Training a cohort in one batch against training its clients one by one."""

from __future__ import annotations

import gc
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcustom.aggregation.settings import AggregationSettings
from fedcustom.core.errors import UpdateError
from fedcustom.data.examples import ClientData
from fedcustom.methods import Client, Update, Work
from fedcustom.methods.tuning import local_training
from fedcustom.methods.tuning.batching.parallel_passes import ParallelPasses
from fedcustom.methods.tuning.batching.trainer import clip_each, passes, saved_bytes, train_together
from fedcustom.methods.tuning.messages import TrainUpdate
from fedcustom.methods.tuning.objective import Supervised
from fedcustom.transport.messages import values_of
from helpers.methods import ALONE, MODELS, SETTINGS, SINGLE, examples_for, make
from helpers.plain import watched
from helpers.rounds import distance, rounds


@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize("name", list(SETTINGS))
def test_the_same_as_one_by_one(tiny: dict[str, str], name: str, model: str) -> None:
    kind, technique = MODELS[model], name.split()[0]
    options: dict[str, Any] = {
        **SETTINGS[name],
        "training": {"batch_size": 3, "clip_norm": 1.0, "optimizer": "sgd", "learning_rate": 0.1},
    }
    double = name not in SINGLE
    alone = rounds(make(tiny[model], technique, kind, **options), kind, together=False, double=double)
    method = make(tiny[model], technique, kind, **options)
    assert (method.widest_cohort() == 1) == (name in ALONE)
    together = rounds(method, kind, together=True, double=double)
    for before, after in zip(alone, together, strict=True):
        for client, update in before.items():
            assert distance(update, after[client]) < (1e-7 if double else 1e-5), client
            assert update.weight == after[client].weight
            assert update.steps == after[client].steps
            assert update.loss == pytest.approx(after[client].loss, rel=1e-5)


def test_tensors_are_trained_in_the_models_order(
    tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not in that of a set: norms are sums, whose last bits depend on it, and another process has another
    order.
    """
    orders = []

    def noting(stacks: Any, *rest: Any, **more: Any) -> Any:
        orders.append(list(stacks))
        return train_together(stacks, *rest, **more)

    monkeypatch.setattr(local_training, "train_together", noting)
    method = make(tiny["bert"], "lora", training={"batch_size": 3, "clip_norm": 1.0})
    rounds(method, "classification", together=True)
    assert orders == [[name for name in method.trainable.parameters if name in orders[0]]] * 2


@pytest.mark.parametrize("name", ["prefix", "soft_prompt", "lora", "adapter", "ia3", "bitfit", "full"])
def test_a_last_layer_is_computed_for_the_first_token(tiny: dict[str, str], name: str) -> None:
    method = make(tiny["bert"], name)
    seen = watched(method.base.model, "bert.encoder.layer.1.intermediate")
    for together in (True, False):
        rounds(method, "classification", together=together)
    assert seen
    assert set(seen) == {1}


@pytest.fixture
def side_by_side(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three threads, and passes small enough for each to have its own."""
    threads = torch.get_num_threads()
    monkeypatch.setattr("fedcustom.methods.tuning.batching.trainer.LEAST_TOKENS", 8)
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("model", ["bert", "llama"])
@pytest.mark.parametrize("name", ["prefix", "lora", "adapter", "ia3", "bitfit", "soft_prompt"])
def test_the_same_in_several_threads(
    tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch, side_by_side: None, name: str, model: str
) -> None:
    """Bit by bit, however the threads take turns; to rounding, what one by one gives."""
    kind, folder = MODELS[model], tiny[model]
    rate = 10.0 if name == "ia3" else 0.1
    training = {"batch_size": 3, "clip_norm": 1.0, "optimizer": "sgd", "learning_rate": rate}
    options: dict[str, Any] = {**SETTINGS[name], "training": training}
    begun: set[str] = set()
    row_losses = Supervised.row_losses

    def noted(self: Supervised, model: Any, batch: Any) -> torch.Tensor:
        begun.add(threading.current_thread().name)
        time.sleep(random.uniform(0, 0.003))
        return row_losses(self, model, batch)

    alone = rounds(make(folder, name, kind, **options), kind, together=False)
    monkeypatch.setattr(Supervised, "row_losses", noted)
    first, second = (rounds(make(folder, name, kind, **options), kind, together=True) for _ in range(2))
    assert len({thread for thread in begun if thread.startswith("lane")}) >= 2
    assert torch.get_num_threads() == 3
    for expected, one, other in zip(alone, first, second, strict=True):
        for client, update in expected.items():
            assert distance(update, one[client]) < 1e-5
            assert all(torch.equal(t, other[client].tensors[n]) for n, t in one[client].tensors.items())
            assert values_of(one[client]) == values_of(other[client])


def test_lanes_give_results_in_order_and_errors_in_place(side_by_side: None) -> None:
    def work(number: int) -> tuple[int, int]:
        time.sleep(0.02 / (number + 1))
        if number == 5:
            raise UpdateError("five")
        return number, torch.get_num_threads()

    with ParallelPasses(3) as lanes:
        assert list(lanes.each(work, range(4))) == [(number, 1) for number in range(4)]
        assert list(lanes.each(work, [2])) == [(2, 3)]  # one alone has all threads
        found = lanes.each(work, range(7))
        assert [next(found)[0] for _ in range(5)] == [0, 1, 2, 3, 4]
        with pytest.raises(UpdateError, match="five"):
            next(found)
    assert torch.get_num_threads() == 3
    thread_count: list[int] = []
    thread = threading.Thread(target=lambda: thread_count.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert thread_count == [3]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=80), st.integers(1, 5000))
@settings(max_examples=50, deadline=None)
def test_passes_hold_every_row_once(lengths: list[int], limit: int) -> None:
    found = passes(lengths, limit)
    assert sorted(i for group in found for i in group) == list(range(len(lengths)))
    for group in found:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= limit


def test_gradients_are_clipped_client_by_client() -> None:
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(3, 4, 2, generator=generator), torch.randn(3, 5, generator=generator)
    one[2], two[2] = one[2] / 100, two[2] / 100
    expected = []
    for k in range(3):
        a, b = torch.nn.Parameter(torch.zeros(4, 2)), torch.nn.Parameter(torch.zeros(5))
        a.grad, b.grad = one[k].clone(), two[k].clone()
        torch.nn.utils.clip_grad_norm_([a, b], 1.0)
        expected.append((a.grad, b.grad))
    clip_each([one, two], 1.0)
    for k, (a, b) in enumerate(expected):
        torch.testing.assert_close(one[k], a)
        torch.testing.assert_close(two[k], b)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_every_option_of_training(tiny: dict[str, str], optimizer: str) -> None:
    """FedProx, momentum, weight decay, a head's own rate, clipping, logit adjustment."""
    training = {
        "batch_size": 3, "optimizer": optimizer, "learning_rate": 0.05, "head_learning_rate": 0.01,
        "weight_decay": 0.01, "proximal": 0.1, "clip_norm": 0.5, "logit_adjustment": 1.0,
        "momentum": 0.9 if optimizer == "sgd" else 0.0,
    }  # fmt: skip
    results = []
    for together in (False, True):
        # Of few examples' gradients Muon makes steps in directions that are rounding; one row has none.
        method = make(
            tiny["bert"], "prefix", kind="kv", length=1 if optimizer == "muon" else 4, training=training
        )
        if optimizer != "sgd":
            # Keys of one constant have no true gradient, and AdamW makes a whole step of float32's rounding.
            method.base.model.double()
        results.append(rounds(method, "classification", together=together))
    for before, after in zip(*results, strict=True):
        assert all(distance(update, after[client]) < 1e-5 for client, update in before.items())


@pytest.mark.parametrize("correction", ["scaffold", "feddyn"])
def test_corrections_of_drift(tiny: dict[str, str], correction: str) -> None:
    options: dict[str, Any] = {
        "length": 4, "clients": 4, "aggregation": AggregationSettings(correction=correction),
        "training": {"batch_size": 3, "optimizer": "sgd", "learning_rate": 0.1},
    }  # fmt: skip
    alone = rounds(make(tiny["bert"], "prefix", **options), "classification", together=False)
    together = rounds(make(tiny["bert"], "prefix", **options), "classification", together=True)
    for before, after in zip(alone, together, strict=True):
        assert all(distance(update, after[client]) < 1e-5 for client, update in before.items())


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("model", ["bert", "gpt2"])
@pytest.mark.parametrize("variant", ["flora", "flexlora", "hetlora"])
def test_clients_of_different_ranks_share_a_batch(
    tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch, variant: str, model: str, stabilised: bool
) -> None:
    options: dict[str, Any] = {
        "variant": variant, "rank": 4, "client_ranks": [1, 2, 4], "clients": 4, "rank_stabilised": stabilised,
        "training": {"batch_size": 3, "optimizer": "sgd", "learning_rate": 0.1, "proximal": 0.1},
    }  # fmt: skip
    kind = MODELS[model]
    alone = rounds(make(tiny[model], "lora", kind, **options), kind, together=False)
    batches = []

    def counted(stacks: Any, work: Any, *rest: Any, **named: Any) -> Any:
        batches.append(len(work))
        return train_together(stacks, work, *rest, **named)

    monkeypatch.setattr("fedcustom.methods.tuning.local_training.train_together", counted)
    together = rounds(make(tiny[model], "lora", kind, **options), kind, together=True)
    assert batches == [4, 4]
    for before, after in zip(alone, together, strict=True):
        shapes = {tuple(t.shape for t in update.tensors.values()) for update in after.values()}
        assert len(shapes) == 3
        assert all(distance(update, after[client]) < 1e-5 for client, update in before.items())


@pytest.mark.parametrize("wrong", ["lora_A", "classifier.bias"])
def test_what_a_client_remembers_wrongly_spoils_its_answer_alone(tiny: dict[str, str], wrong: str) -> None:
    method = make(tiny["bert"], "lora")
    name = next(name for name in method.initialise().tensors if wrong in name)
    pool = examples_for("classification")
    clients = {f"c{i}": Client(f"c{i}", ClientData(f"c{i}", pool[3 * i : 3 * i + 3])) for i in range(3)}
    clients["c1"].memory.tensors = {f"state/{name}": torch.zeros(7)}
    tasks = method.configure(method.initialise(), 1, {client: Work(epochs=1) for client in clients})
    answers = method.execute_together([(tasks[client.name], client) for client in clients.values()])
    assert [type(answer) for answer in answers] == [TrainUpdate, UpdateError, TrainUpdate]
    assert f"{name} has shape (7,)" in str(answers[1])


def no_gpu_memory() -> None:
    raise torch.OutOfMemoryError("none left")


def no_memory() -> None:
    torch.empty(2**50)


def no_array() -> None:
    np.empty(2**50)


@pytest.mark.parametrize("fails", [no_gpu_memory, no_memory, no_array])
def test_out_of_memory_halves_the_batch(
    tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch, fails: Callable[[], None]
) -> None:
    options: dict[str, Any] = {"rank": 4, "training": {"batch_size": 3, "optimizer": "sgd"}}
    expected = rounds(make(tiny["bert"], "lora", **options), "classification", together=True)
    method = make(tiny["bert"], "lora", **options)
    plain, sizes = method.objective.row_losses, []

    def scarce(model: Any, batch: Any) -> torch.Tensor:
        sizes.append(len(batch["labels"]))
        if sizes[-1] > 2:
            fails()
        return plain(model, batch)

    monkeypatch.setattr(method.objective, "row_losses", scarce)
    again = rounds(method, "classification", together=True)
    assert max(sizes) > 2
    for before, after in zip(expected, again, strict=True):
        assert all(distance(update, after[client]) < 1e-5 for client, update in before.items())


def test_a_client_whose_loss_is_not_finite_fails_alone(tiny: dict[str, str]) -> None:
    method = make(tiny["bert"], "lora", rank=4, training={"batch_size": 3, "optimizer": "sgd"})
    examples = examples_for("classification")
    clients = [Client(name, ClientData(name, examples[:4])) for name in "abc"]
    state = method.initialise()
    tasks = method.configure(state, 1, {name: Work(epochs=1) for name in "abc"})
    bad = {name: torch.full_like(t, torch.nan) for name, t in tasks["b"].tensors.items()}
    tasks["b"] = replace(tasks["b"], tensors=bad)
    alone = method.execute(tasks["a"], Client("a", ClientData("a", examples[:4])))
    answers = method.execute_together([(tasks[c.name], c) for c in clients])
    assert isinstance(answers[1], UpdateError)
    assert "not finite after 0 steps" in str(answers[1])
    assert isinstance(answers[0], Update)
    assert distance(alone, answers[0]) < 1e-5
    assert isinstance(answers[2], Update)


def test_a_measured_pass_is_not_kept() -> None:
    """Also where operations keep their own outputs for a backward pass, as ``exp`` and ``tanh`` do, and none
    is made.
    """
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3))
    with saved_bytes() as saved:
        result = (2 * weight).exp().tanh()
    assert sum(saved.values()) >= 2 * 6 * 4
    gone = weakref.ref(weight)
    del weight, result
    gc.collect()
    assert gone() is None


def test_a_measured_pass_has_its_gradients() -> None:
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3))
    (expected,) = torch.autograd.grad((2 * weight).exp().tanh().sum(), weight)
    with saved_bytes():
        result = (2 * weight).exp().tanh()
    torch.testing.assert_close(torch.autograd.grad(result.sum(), weight)[0], expected)
