"""Rounds in which clients fit the head: a discriminant from sums, then logistic regression."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from sklearn.covariance import oas
from sklearn.linear_model import LogisticRegression

from fedcustom.aggregation.settings import AggregationSettings
from fedcustom.core.errors import RecipeError, UpdateError
from fedcustom.data.examples import ClientData, Example
from fedcustom.methods import (
    UNFINISHED,
    Answer,
    Client,
    State,
    Update,
    WeightTuning,
    Work,
    client_labels,
)
from fedcustom.methods.messages import typed
from fedcustom.methods.tuning.head_messages import Sums, sums_of
from fedcustom.methods.tuning.messages import TrainTask
from helpers.head_fit import LABELS, ROUND, aggregate_of, alone_with, asked, fitted
from helpers.methods import classification_examples, make, skewed
from helpers.rounds import distance

SUMS: dict[str, Any] = {**ROUND, "fit_head_steps": 0}
TIGHT: dict[str, Any] = {**ROUND, "fit_head_steps": 1000}


def examples_of(clients: dict[str, Client]) -> list[Example]:
    return [example for client in clients.values() for example in client.data.train]


def labels_of(examples: Iterable[Example]) -> np.ndarray[Any, Any]:
    return np.array([example.label for example in examples])


def inputs_of(method: WeightTuning, state: State, examples: list[Example]) -> np.ndarray[Any, Any]:
    """What goes into the last layer, from the model's own parts and one text at a time."""
    method.trainable.write(state.tensors)
    model = method.trainable.model.eval()
    tokenizer, rows = method.base.tokenizer, []
    for example in examples:
        batch = tokenizer(example.text, return_tensors="pt", truncation=True, max_length=24)
        with torch.no_grad():
            rows.append(model.bert(**batch).pooler_output[0])
    return torch.stack(rows).double().numpy()


def by_density(
    vectors: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], asked: np.ndarray[Any, Any], classes: int
) -> np.ndarray[Any, Any]:
    """log( share_c N(x; m_c, S) / N(x; m, S) ) of each asked x and each class c, with S as scikit-learn
    shrinks it, of as many rows as there are degrees of freedom.
    """
    means = np.stack([vectors[labels == c].mean(axis=0) for c in range(classes)])
    rest = vectors - means[labels]
    _, sizes, directions = np.linalg.svd(rest, full_matrices=False)
    free = len(vectors) - classes
    shape, _ = oas((sizes[:, None] * directions)[:free], assume_centered=True)
    if free > vectors.shape[1]:
        shape, _ = oas(
            np.concatenate([sizes[:, None] * directions, np.zeros((free - len(sizes), vectors.shape[1]))]),
            assume_centered=True,
        )
    shape += 1e-3 * (vectors**2).mean() * np.eye(vectors.shape[1])
    shares = (np.bincount(labels, minlength=classes) + 0.5) / (len(labels) + 0.5 * classes)
    whole = multivariate_normal(vectors.mean(axis=0), shape).logpdf(asked)
    found = [multivariate_normal(means[c], shape).logpdf(asked) for c in range(classes)]
    return np.stack([density - whole for density in found], axis=1) + np.log(shares)


@pytest.mark.parametrize("technique", ["bitfit", "full"])
def test_logits_are_those_of_gaussians(tiny: dict[str, str], technique: str) -> None:
    """From clients with other labels each; what changes is the last layer alone."""
    method = make(tiny["bert"], technique, training=SUMS)
    clients, state = skewed(), method.initialise()
    merged, report = (whole := aggregate_of(method, clients)).state, whole.report
    examples, asked_of = examples_of(clients), classification_examples(9)
    vectors = inputs_of(method, state, [*examples, *asked_of])
    expected = by_density(vectors[: len(examples)], labels_of(examples), vectors[len(examples) :], LABELS)
    found = method.predict(merged, asked_of, texts=False).scores
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3 * abs(expected).max())
    changed = {name for name in state.tensors if not torch.equal(state.tensors[name], merged.tensors[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    assert report == {"head": "fitted to 24 examples of 3 clients"}


@pytest.mark.parametrize("technique", ["bitfit", "lora"])
def test_the_head_is_scikit_learns_logistic_regression(tiny: dict[str, str], technique: str) -> None:
    """On all examples in one place; theirs has C for vectors as long as these."""
    method = make(tiny["bert"], technique, training={**TIGHT, "fit_head_c": 5.0})
    clients, state = skewed(), method.initialise()
    examples, asked_of = examples_of(clients), classification_examples(9)
    model = method.base.model
    vectors = method.client.head.inputs(method.tokens([*examples, *asked_of])).double().numpy()
    if technique == "bitfit":
        np.testing.assert_allclose(vectors, inputs_of(method, state, [*examples, *asked_of]), atol=1e-6)
    assert model is method.base.model
    own = vectors[: len(examples)]
    c = 5.0 / (own**2).sum(axis=1).mean()
    theirs = LogisticRegression(C=c, tol=1e-12, max_iter=100_000).fit(own, labels_of(examples))
    after = fitted(method, clients)
    found = method.predict(after, asked_of, texts=False).scores
    expected = theirs.decision_function(vectors[len(examples) :])
    np.testing.assert_allclose(
        found - found.mean(axis=1, keepdims=True), expected - expected.mean(axis=1, keepdims=True), atol=5e-3
    )
    assert UNFINISHED not in after.values


@pytest.mark.parametrize("technique", ["prefix", "lora", "soft_prompt", "adapter"])
def test_skew_makes_no_difference(tiny: dict[str, str], technique: str) -> None:
    """The clients' head is that of one client with all examples, alone or in a batch."""
    for training, within in ((SUMS, 1e-5), ({**TIGHT, "fit_head_c": 1.0}, 1e-3)):
        method = make(tiny["bert"], technique, training=training)
        clients, state = skewed(), method.initialise()
        tasks, answers = asked(method, state, clients)
        together = method.execute_together([(tasks[name], client) for name, client in clients.items()])
        for answer, update in zip(answers, together, strict=True):
            assert isinstance(update, Update)
            assert all(torch.equal(t, update.tensors[n]) for n, t in answer.update.tensors.items())
        pooled = {"all": Client("all", ClientData("all", examples_of(clients)))}
        states = [fitted(method, clients), fitted(method, pooled)]
        heads = [Update({name: after.tensors[name] for name in method.trainable.head}) for after in states]
        # What the tiny model makes of a soft prompt hardly varies: its head magnifies float32's rounding.
        assert distance(*heads) < (2e-2 if technique == "soft_prompt" else within)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 30)), min_size=1, max_size=50),
    st.integers(1, 5),
    st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_sums_add_up(rows: list[tuple[int, int, int]], least: int, seed: int) -> None:
    """To counts of all examples, and to moments of those of labels of which the client has enough texts; the
    others are not sent in any form.
    """
    generator = np.random.default_rng(seed)
    vectors = generator.normal(size=(len(rows), 4)).astype(np.float32)
    owners, labels, texts = np.array(rows).T
    sums, kept, pieces = Sums.zero(5, 4), np.zeros(len(rows), dtype=bool), 0
    expected = np.zeros((4, 4))
    for owner in set(owners.tolist()):
        mine = np.flatnonzero(owners == owner)
        arrays = (torch.from_numpy(array[mine]) for array in (vectors, labels, texts))
        sent = sums_of(*arrays, 5, least)
        counts = np.bincount(labels[mine], minlength=5)
        assert sent["counts"].tolist() == counts.tolist()
        counted = np.zeros(5, dtype=int)
        for label in range(5):
            repeats = Counter(texts[mine][labels[mine] == label].tolist())
            if repeats and max(repeats.values()) * least <= counts[label]:
                counted[label] = counts[label]
        assert sent["counted"].tolist() == counted.tolist()
        assert len(sent["totals"]) == (counted > 0).sum()
        own = mine[counted[labels[mine]] > 0]
        kept[own] = True
        different, names = len(set(texts[own].tolist())), len(set(labels[own].tolist()))
        angles = len(list(itertools.combinations(range(different - names), 2)))
        if least == 1 or angles >= least * different:
            assert len(sent["factor"]) == sum(4 - row for row in range(min(4, len(own))))
            expected += vectors[own].T @ vectors[own]
            pieces += len(own)
        else:
            assert not len(sent["factor"])
            for label in set(labels[own].tolist()):
                total = vectors[own][labels[own] == label].sum(axis=0)
                expected += np.outer(total, total) / counted[label]
                pieces += 1
        sums.add(sent)
    assert sums.counts.tolist() == np.bincount(labels, minlength=5).tolist()
    assert sums.sent.tolist() == np.bincount(labels[kept], minlength=5).tolist()
    totals = np.zeros((5, 4))
    np.add.at(totals, labels[kept], vectors[kept])
    np.testing.assert_allclose(sums.totals.numpy(), totals, atol=1e-5)
    np.testing.assert_allclose(sums.scatter.numpy(), expected, atol=1e-4)
    assert sums.pieces == pieces
    if least == 1:
        assert kept.all()


def test_a_head_that_could_not_be_fitted_trains(tiny: dict[str, str]) -> None:
    """Though it would rest: as it was drawn at random it is no use."""
    # Of nine texts and one, the one is withheld, and its label with it: that fit is only a beginning.
    for least, client, unfitted in (
        (3, alone_with(0), True),
        (3, alone_with(9), True),
        (1, alone_with(9), False),
    ):
        training = {**ROUND, "fit_head_least_texts": least, "freeze_head_rounds": 9}
        method = make(tiny["bert"], "lora", training=training)
        state = fitted(method, {"d": client})
        task = method.configure(state, 2, {"d": Work(epochs=1)})["d"]
        assert typed(task, TrainTask).head_unfitted == unfitted
        update = method.execute(task, client)
        method.check(task, update)
        assert any("classifier" in name for name in update.tensors) == unfitted
        after = method.aggregate(state, iter([Answer("d", task, update)])).state
        changed = {n for n, tensor in state.tensors.items() if not torch.equal(tensor, after.tensors[n])}
        assert any("classifier" in name for name in changed) == unfitted


def test_a_local_head_of_single_examples(tiny: dict[str, str]) -> None:
    """A client withholds nothing from itself."""
    method = make(tiny["bert"], "bitfit", training=ROUND, keeps="everything")
    client = alone_with(1)
    method.execute(method.configure(method.initialise(), 1, {"d": Work(epochs=1)})["d"], client)
    own = {name.removeprefix("state/"): t for name, t in client.memory.tensors.items()}
    vectors = method.client.head.inputs(method.tokens(client.data.train)).numpy()
    labels = [example.label for example in client.data.train]
    theirs = LogisticRegression(C=10, tol=1e-6, max_iter=1000).fit(vectors, labels)
    found = vectors @ own["classifier.weight"].numpy().T + own["classifier.bias"].numpy()
    assert found.argmax(axis=1).tolist() == theirs.predict(vectors).tolist() == labels


def test_once_fitted_the_adjustment_is_relative_to_the_labels_of_all(tiny: dict[str, str]) -> None:
    """By Bayes' rule: a client's logits plus log(own share / everybody's); and nothing where it is alone."""
    method = make(tiny["bert"], "prefix", training={**ROUND, "logit_adjustment": 1.0})
    clients = skewed()
    state = fitted(method, clients)
    labels = {name: [e.label for e in client.data.train] for name, client in clients.items()}
    together = [sum(rows.count(c) for rows in labels.values()) for c in range(LABELS)]
    assert state.values["label_counts"] == together
    for name, task in method.configure(state, 2, {name: Work(epochs=1) for name in clients}).items():
        everybody = (np.array(together) + 1) / (sum(together) + LABELS)
        own = (np.bincount(labels[name], minlength=LABELS) + LABELS * everybody) / (
            len(labels[name]) + LABELS
        )
        offset = method.client.label_offset(task, clients[name])
        assert offset is not None
        assert offset.numpy() == pytest.approx(np.log(own / everybody), rel=1e-5)
        for wrong in ((1, 2), (1, 2, -3), (1, 2, True), (1, 2, 3.0), "123"):
            with pytest.raises(UpdateError, match=r"label_counts .* must be 3 whole numbers"):
                method.execute(replace(typed(task, TrainTask), label_counts=wrong), clients[name])
    parts = method.client.parts
    parts.context = replace(parts.context, keeps="everything")
    assert method.client.label_offset(task, clients[name]) is None


def test_a_fit_to_few_clients_is_none(tiny: dict[str, str]) -> None:
    """Where fewer than half of those asked answer, the head and what is known of labels stay."""
    for answering, of, is_fitted in ((1, 4, False), (2, 4, True), (1, 2, True)):
        training = ROUND if of == 4 else {**ROUND, "fit_head_clients": of}
        method = make(tiny["bert"], "prefix", training=training, clients=4)
        clients = {name: client for name, client in skewed().items() if name in ("b", "c")[-answering:]}
        before = method.initialise()
        merged = aggregate_of(method, clients, before)
        after = merged.state
        assert ("label_counts" in after.values) == is_fitted
        assert all(torch.equal(after.tensors[n], before.tensors[n]) for n in before.tensors) == (
            not is_fitted
        )
        told = {
            name: np.bincount(labels_of(client.data.train), minlength=LABELS).tolist()
            for name, client in clients.items()
        }
        assert client_labels(after) == told
        if not is_fitted:
            assert merged.report == {"head": "not fitted: 1 of 4 clients answered"}


@pytest.mark.parametrize("optimizer", ["fedavgm", "fedadam"])
def test_a_former_head_is_forgotten(tiny: dict[str, str], optimizer: str) -> None:
    """By the server's optimiser and, in a centralised run, by the client's."""
    settings = AggregationSettings(server_optimizer=optimizer)  # type: ignore[arg-type]
    method = make(tiny["bert"], "bitfit", training={**ROUND, "fit_head_rounds": [2]}, aggregation=settings)
    parts = method.server.parts
    parts.context = method.ownership.context = replace(parts.context, keeps="optimizer")
    client, state = skewed()["c"], method.initialise()
    for number in (1, 2):
        merged = aggregate_of(method, {"c": client}, state, number)
        state = merged.state
        head = {n: t for n, t in state.server.items() if "classifier" in n}
        assert head
        assert all(bool(t.any()) == (number == 1) for t in head.values())
        assert any("classifier" in name for name in client.memory.tensors) == (number == 1)
    assert any(t.any() for t in state.server.values())
    assert any("moments/" in name for name in client.memory.tensors)
    assert state.values == {"label_counts": [2, 3, 4]}
    assert merged.report == {"head": "fitted to 9 examples of 1 clients"}
    task = method.configure(state, 3, {"c": Work(epochs=1)})["c"]
    method.check(task, method.execute(task, client))
    assert not method.client.head.rows  # of what the model was


@pytest.mark.parametrize("steps", [0, 12])
def test_a_local_head(tiny: dict[str, str], steps: int) -> None:
    """Is what the server would make of that client's sums and gradients."""
    training = {**ROUND, "fit_head_steps": steps}
    method = make(tiny["bert"], "bitfit", training=training)
    alone = make(tiny["bert"], "bitfit", training=training, keeps="everything")
    client = skewed()["c"]
    expected = fitted(method, {"c": skewed()["c"]}).tensors
    task = alone.configure(alone.initialise(), 1, {"c": Work(epochs=1)})["c"]
    update = alone.execute(task, client)
    alone.check(task, update)
    assert not update.tensors
    assert not alone.client.head.rows
    own = {name.removeprefix("state/"): t for name, t in client.memory.tensors.items()}
    assert own.keys() == expected.keys()
    for name, tensor in own.items():  # gradients travel as float32
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4 if steps else 0)


def test_a_compiled_model(tiny: dict[str, str]) -> None:
    """Compiled before or after: the sums are the same, and nothing of them stays in the model."""
    plain = make(tiny["bert"], "prefix", training=ROUND)
    expected = asked(plain, plain.initialise(), skewed())[1]
    method = make(tiny["bert"], "prefix", training=ROUND)
    method.trainable.model.compile(backend="eager", dynamic=True)
    method.predict(method.initialise(), classification_examples(3), texts=False)
    for _ in range(2):
        found = asked(method, method.initialise(), skewed())[1]
        for one, other in zip(expected, found, strict=True):
            assert all(torch.equal(t, other.update.tensors[n]) for n, t in one.update.tensors.items())
    assert not method.head_fit.layer.module._forward_pre_hooks


def test_a_head_without_a_bias(tiny: dict[str, str]) -> None:
    with pytest.raises(RecipeError, match="does not end in a layer with a bias"):
        make(tiny["llama"], "prefix", training=ROUND)
