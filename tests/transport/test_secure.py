"""Changes as vectors of integers, and sums of them in a simulation, against the weighted mean of floats."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcustom.aggregation.mean import weighted_mean
from fedcustom.core.errors import RecipeError, UpdateError
from fedcustom.federated.build import summation
from fedcustom.methods.messages import Update
from fedcustom.methods.tuning.messages import TrainTask, TrainUpdate
from fedcustom.privacy.secure_sum.integers import zeros
from fedcustom.privacy.secure_sum.terms import Terms
from fedcustom.recipe.recipe import load_recipe
from fedcustom.transport.protocol import Reply, SumTransport, check_visible
from fedcustom.transport.secure import SUM, ChangeVector
from fedcustom.transport.summing import SummingTransport

FORMS = {
    "b": torch.zeros(3),
    "a": torch.zeros(2, 2, dtype=torch.float64),
    "c": torch.zeros((), dtype=torch.bfloat16),
}


def update(seed: int, weight: int, size: float = 1.0) -> TrainUpdate:
    torch.manual_seed(seed)
    tensors = {name: (torch.randn(like.shape) * size).to(like.dtype) for name, like in FORMS.items()}
    return TrainUpdate(tensors, float(weight), loss=float(seed), examples=2 * weight, steps=3 + seed)


@given(st.lists(st.integers(1, 50), min_size=3, max_size=6), st.booleans())
def test_the_sum_is_the_weighted_mean(weights: list[int], by_examples: bool) -> None:
    vector = ChangeVector(8.0, len(weights), 50 if by_examples else None, 0)
    updates = [update(seed, weight) for seed, weight in enumerate(weights)]
    total = zeros(vector.length(FORMS), 32)
    for number, each in enumerate(updates):
        total = total + vector.encode(each, FORMS, 1, f"client-{number}")
    found = vector.decode(total, FORMS, len(weights))
    shares = [float(weight) if by_examples else 1.0 for weight in weights]
    wanted = weighted_mean((each.tensors, share) for each, share in zip(updates, shares, strict=True))
    # An error of one step a client, over the sum of the shares.
    step = 8.0 / 2 ** (30 - (len(weights) - 1).bit_length())
    most = step * len(weights) / (sum(shares) / (50 if by_examples else 1)) + 1e-6
    for name, tensor in wanted.items():
        assert found.tensors[name].dtype == FORMS[name].dtype
        slack = 2e-2 if name == "c" else 0.0  # bfloat16
        assert (found.tensors[name].double() - tensor.double()).abs().max() <= most + slack
    assert found.weight == sum(shares)
    assert found.examples == sum(2 * weight for weight in weights)
    assert found.steps == round(sum(each.steps for each in updates) / len(updates))
    loss = sum(share * each.loss for share, each in zip(shares, updates, strict=True)) / sum(shares)
    assert abs(found.loss - loss) < 1e-2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (update(0, 10, size=1e3), r"secure_sum.bound = 8: \w holds a number of size"),
        (update(0, 51), r"secure_sum.most_examples = 50: a client has 51 training examples"),
        (TrainUpdate({}, 1.0, loss=0.0, examples=1, steps=1), "other tensors than the task asks for"),
        (TrainUpdate({**update(0, 1).tensors, "b": torch.zeros(4)}, 1.0, loss=0.0, examples=1, steps=1),
         r"b has shape \(4,\), not \(3,\)"),
        (TrainUpdate(update(0, 1).tensors, 1.0, loss=2000.0, examples=1, steps=1), "loss is beyond 1024"),
        (TrainUpdate(update(0, 1).tensors, 1.0, loss=float("nan"), examples=1, steps=1), "loss is beyond"),
        (TrainUpdate(update(0, 1).tensors, 1.0, loss=0.0, examples=2**30, steps=1), "a count of 1073741824"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(changed: TrainUpdate, message: str) -> None:
    with pytest.raises(UpdateError, match=message):
        ChangeVector(8.0, 3, 50, 0).encode(changed, FORMS, 1, "a")


def test_a_sum_that_is_none() -> None:
    vector = ChangeVector(8.0, 3, 50, 0)
    for total in (zeros(12, 32), zeros(vector.length(FORMS), 32)):
        with pytest.raises(UpdateError, match="the sum of the clients' changes is malformed"):
            vector.decode(total, FORMS, 3)


class Method:
    def change_forms(self, task: Any) -> Any:
        return FORMS


class Inner:
    """Replies of clients, of which some have no update."""

    def __init__(self, updates: dict[str, Update | None]) -> None:
        self.updates = updates

    def exchange(self, tasks: Any, round_number: int, absent: Any = ()) -> Iterator[Reply]:
        for name, task in tasks.items():
            answer = self.updates[name]
            reason = "" if answer is not None else "dropped out"
            yield Reply(name, task, answer, reason, "", 10, 20, 0.5)


def summing(updates: dict[str, Update | None]) -> list[Reply]:
    recipe = load_recipe({"secure_sum": {"on": True, "most_examples": 50, "bound": 8.0}})
    summed = summation(recipe, cast(Any, Method()), len(updates))
    assert summed is not None
    assert summed.terms == Terms()
    transport = SummingTransport(Inner(updates), summed)
    assert isinstance(transport, SumTransport)
    check_visible(transport, (), recipe.aggregation)
    return list(transport.exchange({name: TrainTask(dict(FORMS), round_number=1) for name in updates}, 1))


def test_clients_replies_bring_no_update_and_the_sum_comes_last() -> None:
    updates: dict[str, Update | None] = {name: update(n, 5 + n) for n, name in enumerate("abcdefgh")}
    found = summing({**updates, "c": None, "d": update(3, 7, size=1e3)})
    assert [reply.client for reply in found] == [*"abcdefgh", SUM]
    assert [reply.summed for reply in found] == [True, True, False, False, *[True] * 4, False]
    assert all(reply.update is None for reply in found[:-1])
    assert found[2].reason == "dropped out"
    assert found[3].reason.startswith("secure_sum.bound = 8: ")
    assert found[-1].clients == tuple("abefgh")
    assert found[-1].update is not None
    assert found[-1].update.weight == 5 + 6 + 9 + 10 + 11 + 12
    assert (found[-1].bytes_up, found[0].bytes_up) == (0, 20)


def test_too_few_clients_make_no_sum() -> None:
    found = summing({"a": update(1, 5), "b": update(2, 6), "c": None, "d": None})
    assert [reply.client for reply in found] == [*"abcd"]
    assert not any(reply.summed or reply.update for reply in found)
    assert found[0].reason == "2 clients have sent their changes, 3 are needed"
    assert summing({"a": None, "b": None, "c": None})[0].reason == "dropped out"


def test_a_method_that_sends_no_changes_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"secure_sum.on = true: the method's clients do not send changes"):
        summation(
            load_recipe({"secure_sum": {"on": True, "most_examples": 50}}), cast(Any, SimpleNamespace()), 4
        )
    assert summation(load_recipe({}), cast(Any, Method()), 2) is None
