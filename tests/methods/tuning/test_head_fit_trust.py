"""What is refused in rounds that fit the head: from clients, from the server, and between their messages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedcustom.core.errors import UpdateError
from fedcustom.methods import UNFINISHED, Update, Work
from fedcustom.methods.messages import typed
from fedcustom.methods.tuning.head_messages import TEMPERATURES
from fedcustom.methods.tuning.messages import HeadGradientTask, HeadGradientUpdate
from helpers.head_fit import LABELS, ROUND, WIDTH, asked
from helpers.methods import make, skewed


def damaged(update: Update, **tensors: torch.Tensor) -> Update:
    return replace(update, tensors={**update.tensors, **tensors})


def test_sums_that_nobody_has_are_refused(tiny: dict[str, str]) -> None:
    method = make(tiny["bert"], "prefix", training=ROUND)
    tasks, answers = asked(method, method.initialise(), {"b": skewed()["b"]})
    task, update = tasks["b"], answers[0].update
    counts, totals, factor = (update.tensors[n] for n in ("counts", "totals", "factor"))
    rows = int(counts.sum())
    assert {n: tuple(t.shape) for n, t in update.tensors.items()} == {
        "counts": (LABELS,), "counted": (LABELS,), "totals": (2, WIDTH),
        "factor": (rows * WIDTH - rows * (rows - 1) // 2,),
    }  # fmt: skip
    others = torch.tensor([0, 1, -1], dtype=torch.int32)
    wrong = {
        "not the number of examples that counts have": damaged(update, counts=counts + 1),
        "is not the number of examples that": damaged(update, counts=-counts),
        "smaller in some direction than the totals": damaged(
            update, counts=counts + others, counted=counts + others, totals=9 * totals
        ),
        "the scatter is smaller in some direction": damaged(update, factor=factor * 0.5),
        "scatter is smaller in some": damaged(update, totals=totals + 1),
        "not finite": damaged(update, factor=factor * torch.inf),
        "totals has dtype torch.float64": damaged(update, totals=totals.double()),
        "counts has dtype torch.int64": damaged(update, counts=counts.long()),
        r"counts has shape \(4,\), not \(3,\)": damaged(update, counts=torch.ones(4, dtype=torch.int32)),
        "factor has shape": damaged(update, factor=factor[:-1]),
        r"totals has shape \(2, 32\), not \(1, 32\)": damaged(
            update, counted=torch.tensor([0, 0, 4], dtype=torch.int32)
        ),
        "wrong tensor names": Update({"counts": counts, "totals": totals}, update.weight),
        "is not the number of examples that counts": Update({"totals": totals}, update.weight),
        "is not the number of": replace(update, weight=-1.0),
        "weight 2.5 is not the number": replace(update, weight=2.5),
        "weight nan is not": replace(update, weight=float("nan")),
    }
    for message, answer in wrong.items():
        with pytest.raises(UpdateError, match=message):
            method.check(task, answer)


def test_losses_and_gradients_that_nobody_has_are_refused(tiny: dict[str, str]) -> None:
    method = make(tiny["bert"], "prefix", training=ROUND)
    clients, state = skewed(), method.initialise()
    wrong: dict[str, dict[str, Any]] = {
        "scale head": {
            "losses below 0": {"losses": -torch.ones(len(TEMPERATURES))},
            "losses has shape": {"losses": torch.ones(3)},
            "not finite": {"losses": torch.full((len(TEMPERATURES),), torch.nan)},
        },
        "head gradient": {
            "gradient has shape": {"gradient": torch.zeros(LABELS, WIDTH)},
            "gradient has dtype": {"gradient": torch.zeros(LABELS, WIDTH + 1).double()},
            "not finite": {"gradient": torch.full((LABELS, WIDTH + 1), torch.inf)},
            "wrong tensor names": {"losses": torch.ones(len(TEMPERATURES))},
            "larger than": {"gradient": torch.full((LABELS, WIDTH + 1), 3e38)},
            "than [0-9]+ examples": {"gradient": torch.eye(LABELS, WIDTH + 1).flip(1) * 1e3},
        },
    }
    state = method.aggregate(state, iter(asked(method, state, clients)[1])).state
    for kind, cases in wrong.items():
        tasks, answers = asked(method, state, clients)
        assert {task.kind for task in tasks.values()} == {kind}
        for message, tensors in cases.items():
            with pytest.raises(UpdateError, match=message):
                method.check(tasks["b"], replace(answers[1].update, tensors=tensors))
        for weight in (-1.0, 0.5, float("inf"), "8"):
            with pytest.raises(UpdateError, match="is not the number of examples"):
                method.check(tasks["b"], replace(answers[1].update, weight=weight))
        if kind == "head gradient":
            step = typed(answers[1].update, HeadGradientUpdate)
            for objective in (None, -1.0, float("nan"), float("inf"), "1"):
                with pytest.raises(UpdateError, match="is not a sum of losses"):
                    method.check(tasks["b"], replace(step, objective=objective))
        state = method.aggregate(state, iter(answers)).state


def test_a_client_that_was_started_anew(tiny: dict[str, str]) -> None:
    """It says so, and the others go on; where they are fewer than half, the discriminant stays."""
    method = make(tiny["bert"], "bitfit", training=ROUND)
    clients, state = skewed(), method.initialise()
    state = method.aggregate(state, iter(asked(method, state, clients)[1])).state
    first = state
    for name, left in (("a", 2), ("b", 1)):
        state = method.aggregate(
            state, iter(asked(method, state, clients)[1])
        ).state  # of scales, or gradients
        method.client.head.rows.pop(name)
        task = method.configure(state, 1, {name: Work()})[name]
        with pytest.raises(UpdateError, match="vectors of this round are gone: this client was started anew"):
            method.execute(task, clients.pop(name))
        assert len(clients) == left
    merged = method.aggregate(state, iter(asked(method, state, clients)[1]))
    state = merged.state
    assert UNFINISHED not in state.values
    assert "; 1 of 3 clients went on; kept the discriminant" in str(merged.report)
    scale = state.tensors["classifier.weight"] / first.tensors["classifier.weight"]
    assert float(scale.max() - scale.min()) < 1e-5  # the discriminant, scaled
    # The rest's own head, where they are enough.
    clients = skewed()
    state = method.aggregate(method.initialise(), iter(asked(method, method.initialise(), clients)[1])).state
    clients.pop("c")
    while UNFINISHED in state.values:
        merged = method.aggregate(state, iter(asked(method, state, clients)[1]))
        state = merged.state
    assert "fitted to" in str(merged.report)
    assert "kept" not in str(merged.report)
    # None at all.
    state = method.aggregate(method.initialise(), iter(asked(method, method.initialise(), clients)[1])).state
    merged = method.aggregate(state, iter([]))
    assert "; 0 of 2 clients went on; kept the discriminant" in str(merged.report)


def test_only_what_the_recipe_asks_for_is_answered(tiny: dict[str, str]) -> None:
    """Whatever the server says: sums in a round of training, training in one of sums."""
    client = skewed()["c"]
    for rounds, kind in (
        ([1], "train"), ([2], "fit head"), ([], "fit head"), ([2], "head gradient"), ([], "scale head")
    ):  # fmt: skip
        method = make(tiny["bert"], "prefix", training={"fit_head_rounds": rounds})
        given = method.configure(method.initialise(), 1, {"c": Work(epochs=1)})["c"]
        task = method.messages[kind].task(given.tensors, round_number=1)
        with pytest.raises(UpdateError, match=f"no task '{kind}' in round 1"):
            method.execute(task, client)
        (answer,) = method.execute_together([(task, client)])
        assert isinstance(answer, UpdateError)


def test_no_more_steps_than_the_recipe_says(tiny: dict[str, str]) -> None:
    """A server that asks on and on learns no more than the recipe tells."""
    method = make(tiny["bert"], "bitfit", training={**ROUND, "fit_head_steps": 2})
    client = skewed()["c"]
    first = method.configure(method.initialise(), 1, {"c": Work(epochs=1)})["c"]
    method.execute(first, client)
    point = {"head_point": torch.zeros(LABELS, WIDTH + 1)}
    step = HeadGradientTask(point, round_number=first.round_number)
    for _ in range(3):  # the temperature, and two gradients
        method.check(step, method.execute(step, client))
    with pytest.raises(UpdateError, match="more steps were asked for than"):
        method.execute(step, client)
