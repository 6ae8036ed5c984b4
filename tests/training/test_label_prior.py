"""Remedies for label skew in a client's training: the label prior in the logits, and a head that rests."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fedcustom
from fedcustom.core.errors import RecipeError
from fedcustom.core.seeds import name_seed
from fedcustom.data.examples import Example
from fedcustom.data.tokens import example_order
from fedcustom.methods import Update, Work
from fedcustom.recipe.recipe import load_recipe
from fedcustom.training.label_prior import label_offset
from helpers.methods import classification_examples, make, skewed
from helpers.rounds import distance
from helpers.runs import rows_of

RATE = 0.1


@given(st.lists(st.integers(0, 4), max_size=30), st.floats(0.1, 3), st.floats(0.01, 5))
@settings(max_examples=30, deadline=None)
def test_the_offset_is_the_log_of_smoothed_shares(labels: list[int], tau: float, s: float) -> None:
    found = label_offset(labels, 5, strength=tau, prior_count=s)
    expected = [tau * math.log((labels.count(c) + s) / (len(labels) + 5 * s)) for c in range(5)]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    assert float((found.double() / tau).exp().sum()) == pytest.approx(1, rel=1e-5)


def test_without_a_floor_labels_that_a_client_lacks_leave_its_softmax() -> None:
    logits = torch.randn(3, generator=torch.Generator().manual_seed(0)).double()
    shares = (logits + label_offset([1, 2, 2], 3, prior_count=1e-6).double()).softmax(0)
    kept = torch.log(torch.tensor([1 / 3, 2 / 3], dtype=torch.double))
    torch.testing.assert_close(shares[1:], (logits[1:] + kept).softmax(0), rtol=1e-4, atol=1e-5)


@given(st.lists(st.integers(0, 3), max_size=30), st.lists(st.integers(0, 40), min_size=4, max_size=4))
@settings(max_examples=30, deadline=None)
def test_relative_to_everybody_the_offset_is_the_ratio_of_shares(
    labels: list[int], others: list[int]
) -> None:
    """The client's shares, drawn towards everybody's by s examples a label, over everybody's."""
    overall = [others[c] + labels.count(c) for c in range(4)]
    found = label_offset(labels, 4, strength=2.0, prior_count=0.5, overall=overall)
    for c in range(4):
        everybody = (overall[c] + 0.5) / (sum(overall) + 2)
        own = (labels.count(c) + 2 * everybody) / (len(labels) + 2)
        assert float(found[c]) == pytest.approx(2 * math.log(own / everybody), rel=1e-5, abs=1e-6)


@given(st.lists(st.integers(1, 9), min_size=3, max_size=3), st.integers(1, 20))
@settings(max_examples=20, deadline=None)
def test_a_client_like_everybody_adds_nothing(counts: list[int], clients: int) -> None:
    """To the floor's rounding: shares that are equal but for the examples that it adds."""
    labels = [c for c in range(3) for _ in range(100 * counts[c])]
    found = label_offset(labels, 3, overall=[100 * clients * count for count in counts])
    assert float(found.abs().max()) < 0.02


def test_a_client_that_was_not_counted_counts_itself() -> None:
    """Else a label that is missing in the counts of all would have the largest offset."""
    found = label_offset([1] * 20, 3, overall=[5000, 0, 10])
    assert found.tolist() == label_offset([1] * 20, 3, overall=[5000, 20, 10]).tolist()


def counted(examples: list[Example], label: int) -> int:
    return sum(example.label == label for example in examples)


@pytest.mark.parametrize("technique", ["prefix", "lora", "bitfit"])
@pytest.mark.parametrize(("tau", "floor"), [(1.0, 1.0), (0.5, 0.1)])
def test_training_against_a_plain_loop(
    tiny: dict[str, str], technique: str, tau: float, floor: float
) -> None:
    """Gradient steps on -log( p_y e^z_y / sum_c p_c e^z_c ), p the client's smoothed shares to the tau;
    one by one and all clients in one batch.
    """
    training = {
        "optimizer": "sgd", "learning_rate": RATE, "batch_size": 4,
        "logit_adjustment": tau, "prior_count": floor,
    }  # fmt: skip
    method = make(tiny["bert"], technique, training=training)
    start = method.initialise().tensors
    plain = make(tiny["bert"], technique, training={"optimizer": "sgd", "learning_rate": RATE})
    clients = skewed()
    tasks = method.configure(method.initialise(), 1, {name: Work(epochs=1) for name in clients})
    together = method.execute_together([(tasks[name], client) for name, client in skewed().items()])
    for (name, client), shared in zip(clients.items(), together, strict=True):
        examples = client.data.train
        odds = torch.tensor([((counted(examples, c) + floor) / (len(examples) + 3 * floor)) ** tau
                             for c in range(3)])  # fmt: skip
        order = example_order(len(examples), 0, len(examples), [0, 5, name_seed(name)])
        tokens = plain.tokens(examples)
        plain.trainable.write(start)
        plain.trainable.model.eval()
        for begin in range(0, len(examples), 4):
            batch = plain.objective.collate([tokens[i] for i in order[begin : begin + 4]])
            logits = plain.trainable.model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits
            weighted = odds * logits.exp()
            chosen = weighted.gather(1, batch["labels"][:, None])[:, 0] / weighted.sum(1)
            parameters = list(plain.trainable.parameters.values())
            gradients = torch.autograd.grad(-chosen.log().mean(), parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter -= RATE * gradient
        after = plain.trainable.read()
        expected = Update({n: after[n] - start[n] for n in after})
        assert isinstance(shared, Update), shared
        assert distance(expected, method.execute(tasks[name], client)) < 1e-4
        assert distance(expected, shared) < 1e-4


def test_it_is_for_training_alone(tiny: dict[str, str]) -> None:
    examples = classification_examples(12)
    on = make(tiny["bert"], "prefix", training={"logit_adjustment": 1.0})
    off = make(tiny["bert"], "prefix")
    said = [m.predict(m.initialise(), examples, texts=False).scores for m in (on, off)]
    assert said[0].tolist() == said[1].tolist()


def test_a_client_of_its_own_keeps_its_prior(tiny: dict[str, str]) -> None:
    """Personalisation trains as if neither remedy were there."""
    options = {"logit_adjustment": 1.0, "freeze_head_rounds": 1}
    own = []
    for training in (options, {}):
        method = make(tiny["bert"], "lora", training=training)
        own.append(method.adapt(method.initialise(), skewed()["b"], 1).tensors)
    assert all(torch.equal(own[0][name], own[1][name]) for name in own[0])


@pytest.mark.parametrize("together", [False, True])
def test_a_head_that_rests(tiny: dict[str, str], together: bool) -> None:
    """In its first rounds the head neither changes nor travels up; the rest trains as with a fixed head."""
    training = {"freeze_head_rounds": 1, "optimizer": "sgd", "learning_rate": RATE}
    method = make(tiny["bert"], "lora", training=training)
    head = method.trainable.head
    for number in (1, 2):
        clients = skewed()
        tasks = method.configure(method.initialise(), number, {name: Work(epochs=1) for name in clients})
        pairs = [(tasks[name], client) for name, client in clients.items()]
        updates = method.execute_together(pairs) if together else [method.execute(*pair) for pair in pairs]
        for (task, _), update in zip(pairs, updates, strict=True):
            assert isinstance(update, Update)
            method.check(task, update)
            assert head <= task.tensors.keys()
            assert (not head & update.tensors.keys()) == (number == 1)
            assert all(float(tensor.abs().max()) > 0 for n, tensor in update.tensors.items() if "lora_B" in n)


def test_whole_runs(small: dict[str, Any], tmp_path: Path) -> None:
    overrides = {"training.freeze_head_rounds": 1, "training.logit_adjustment": 1.0}
    run = fedcustom.run(small, overrides, out=tmp_path / "run")
    first, second = (sum(row["bytes_up"].values()) for row in rows_of(run.directory)[1:])
    # 32 x 3 weights of the head, and their bias, in float32 of each of four clients
    assert second - first == pytest.approx(4 * 4 * (32 * 3 + 3), abs=4 * 250)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"training.logit_adjustment": -1.0}, "training.logit_adjustment = -1.0.*greater than or equal to 0"),
        (
            {"training.prior_count": 0.5, "training.logit_adjustment": 0.0},
            "training.prior_count = 0.5: has no effect",
        ),
        (
            {"training.prior_count": 0.5, "training.fit_head_rounds": [1]},
            "training.prior_count = 0.5: has no effect",
        ),
        ({"training.freeze_head_rounds": 20}, "freeze_head_rounds = 20: must be below rounds.count = 20"),
        (
            {"data.task": "generation", "training.logit_adjustment": 1.0},
            "logit_adjustment = 1.0: needs labels",
        ),
        ({"method.name": "prompt_engineering", "training.logit_adjustment": 1.0}, "has no meaning"),
    ],
)
def test_bad_input(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe({}, overrides)
