"""What a head is fitted by: moments, linear discriminants and logistic regression, from what adds up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import oas
from sklearn.linear_model import LogisticRegression
from torch.nn import functional

from fedcustom.aggregation.discriminant import class_moments, discriminant, shrunk
from fedcustom.aggregation.logistic import LogisticFit, loss_and_gradient

Array = np.ndarray[Any, Any]


def data(examples: int, width: int, classes: int, seed: int, *, apart: float = 1.0) -> tuple[Array, Array]:
    """Vectors of length 1 of classes that overlap, whose numbers are correlated."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=examples)
    mixing = generator.normal(size=(width, width)) * np.linspace(1.0, 0.05, width)
    vectors = (
        generator.normal(size=(examples, width)) + apart * generator.normal(size=(classes, width))[labels]
    )
    vectors = vectors @ mixing + generator.normal(size=width)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), labels


def fit(
    parts: list[tuple[Array, Array]], classes: int, *, c: float, steps: int
) -> tuple[LogisticFit, list[float]]:
    """The fit of clients with these vectors and labels, and the penalised loss of each of its heads."""
    clients = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in parts]
    scatter: Any = sum(x.T @ x for x, _ in clients)
    total: Any = sum(x.sum(dim=0) for x, _ in clients)
    examples = float(sum(len(y) for _, y in clients))
    made = LogisticFit(torch.zeros(classes, len(total) + 1), scatter, total, examples, c=c, steps=steps)
    values = []
    while not made.done:
        found = [loss_and_gradient(made.point, *client) for client in clients]
        made.tell(sum(loss for loss, _ in found), torch.stack([g for _, g in found]).sum(dim=0), examples)
        values.append(made.value)
    return made, values


def split(vectors: Array, labels: Array, clients: int) -> list[tuple[Array, Array]]:
    """By label: each client has some classes alone."""
    return [(vectors[labels % clients == k], labels[labels % clients == k]) for k in range(clients)]


@pytest.mark.parametrize("c", [0.1, 10.0, 1000.0])
def test_the_head_is_that_of_scikit_learn(c: float) -> None:
    """Of clients that share no label; C as scikit-learn has it, since vectors have length 1."""
    vectors, labels = data(300, 12, 6, 0)
    made, _ = fit(split(vectors, labels, 3), 6, c=c, steps=1000)
    theirs = LogisticRegression(C=c, tol=1e-12, max_iter=100_000).fit(vectors, labels)
    found = made.best.numpy()
    np.testing.assert_allclose(found[:, :-1], theirs.coef_, atol=1e-3 * np.abs(theirs.coef_).max())
    np.testing.assert_allclose(
        found[:, -1] - found[:, -1].mean(),
        theirs.intercept_ - theirs.intercept_.mean(),
        atol=1e-3 * np.abs(theirs.coef_).max(),
    )


def test_two_classes_and_one_that_nobody_has() -> None:
    """A label without examples is never the likeliest, and changes nothing between the others."""
    vectors, labels = data(200, 8, 2, 1)
    made, _ = fit(split(vectors, labels, 2), 3, c=10.0, steps=1000)
    logits = np.concatenate([vectors, np.ones((200, 1))], axis=1) @ made.best.numpy().T
    assert (logits.argmax(axis=1) < 2).all()
    # scikit-learn penalises one vector where two classes have two of half the length.
    theirs = LogisticRegression(C=20.0, tol=1e-12, max_iter=100_000).fit(vectors, labels)
    np.testing.assert_allclose(logits[:, 1] - logits[:, 0], theirs.decision_function(vectors), atol=0.01)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_twelve_steps_are_enough(seed: int) -> None:
    """On correlated vectors of many classes, from clients that share no label: 99.8 % of the way from a head
    of zeros to the least loss.
    """
    vectors, labels = data(2000, 48, 30, seed, apart=2.0)
    parts = split(vectors, labels, 5)
    made, values = fit(parts, 30, c=10.0, steps=12)
    best, _ = fit(parts, 30, c=10.0, steps=1000)
    assert len(values) <= 12
    assert values == sorted(values, reverse=True)
    assert made.value - best.value < 0.002 * (values[0] - best.value)


@given(st.integers(0, 99), st.integers(1, 6), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_gradients_are_those_of_autograd_and_add_up(seed: int, clients: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(17, 5, generator=generator, dtype=torch.double)
    labels = torch.randint(classes, (17,), generator=generator)
    point = torch.randn(classes, 6, generator=generator, dtype=torch.double, requires_grad=True)
    whole = functional.cross_entropy(vectors @ point[:, :5].T + point[:, 5], labels, reduction="sum")
    whole.backward()
    owners = torch.randint(clients, (17,), generator=generator)
    parts = [
        loss_and_gradient(point.detach(), vectors[owners == k], labels[owners == k]) for k in range(clients)
    ]
    assert sum(loss for loss, _ in parts) == pytest.approx(whole.item(), rel=1e-12)
    assert point.grad is not None
    torch.testing.assert_close(torch.stack([g for _, g in parts]).sum(dim=0), point.grad, atol=1e-9, rtol=0)


def test_the_penalty_goes_with_the_vectors_length() -> None:
    """Vectors ten times as long, a head a tenth as large: C means the same for all encoders."""
    vectors, labels = data(200, 8, 4, 2)
    one, _ = fit([(vectors, labels)], 4, c=10.0, steps=1000)
    other, _ = fit([(10 * vectors, labels)], 4, c=10.0, steps=1000)
    torch.testing.assert_close(10 * other.best[:, :-1], one.best[:, :-1], atol=1e-3, rtol=1e-3)


def test_a_client_that_is_gone_is_done_without() -> None:
    """The rest's head is found from where the fit was."""
    vectors, labels = data(300, 8, 4, 3)
    first, second = split(vectors, labels, 2)
    second = (np.concatenate([second[0], first[0][:50]]), np.concatenate([second[1], first[1][:50]]))
    parts = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in (first, second)]
    every = torch.cat([x for x, _ in parts])
    made = LogisticFit(torch.zeros(4, 9), every.T @ every, every.sum(dim=0), len(every), c=10.0, steps=500)
    for step in range(500):
        there = parts if step < 5 else parts[1:]
        found = [loss_and_gradient(made.point, *part) for part in there]
        made.tell(
            sum(loss for loss, _ in found),
            torch.stack([g for _, g in found]).sum(dim=0),
            sum(len(y) for _, y in there),
        )
        if made.done:
            break
    theirs = LogisticRegression(C=10.0, tol=1e-12, max_iter=100_000).fit(*second)
    np.testing.assert_allclose(made.best[:, :-1].numpy(), theirs.coef_, atol=2e-3 * abs(theirs.coef_).max())


def test_a_fit_of_no_steps_is_done() -> None:
    made = LogisticFit(torch.zeros(2, 3), torch.eye(2).double(), torch.zeros(2).double(), 2, c=1, steps=0)
    assert made.done
    assert not made.best.any()


# --- discriminants ---


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=8, max_size=40), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_moments_add_up(rows: list[tuple[int, int]], seed: int) -> None:
    """Over however many clients, and with labels that nobody has."""
    generator = np.random.default_rng(seed)
    vectors = generator.normal(size=(len(rows), 5))
    labels, owners = np.array(rows).T
    counts, totals, scatter = torch.zeros(6), torch.zeros(6, 5), torch.zeros(5, 5)
    counts, totals, scatter = counts.double(), totals.double(), scatter.double()
    for owner in set(owners.tolist()):
        own, which = torch.from_numpy(vectors[owners == owner]), torch.from_numpy(labels[owners == owner])
        counts += torch.bincount(which, minlength=6)
        totals.index_add_(0, which, own)
        scatter += own.T @ own
    means, within = class_moments(counts, totals, scatter)
    rest = vectors.copy()
    for label in range(6):
        mine = labels == label
        mean = vectors[mine].mean(axis=0) if mine.any() else vectors.mean(axis=0)
        np.testing.assert_allclose(means[label].numpy(), mean, atol=1e-9)
        rest[mine] -= mean
    degrees = max(1, len(rows) - len(set(labels.tolist())))
    np.testing.assert_allclose(within.numpy(), rest.T @ rest / degrees, atol=1e-9)


def test_discriminants_are_those_of_scikit_learn() -> None:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    generator = np.random.default_rng(0)
    labels = np.repeat(range(3), [20, 35, 25])
    vectors = generator.normal(size=(80, 4)) + 2 * generator.normal(size=(3, 4))[labels]
    counts = torch.from_numpy(np.bincount(labels))
    totals = torch.stack([torch.from_numpy(vectors[labels == c].sum(axis=0)) for c in range(3)])
    means, within = class_moments(counts, totals, torch.from_numpy(vectors.T @ vectors))
    weight, bias = discriminant(means, within * 77 / 80, counts.double() / 80)  # theirs divides by n
    theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(vectors, labels)
    np.testing.assert_allclose(weight.numpy(), theirs.coef_, rtol=1e-9)
    np.testing.assert_allclose(bias.numpy(), theirs.intercept_, rtol=1e-9)


@pytest.mark.parametrize(("examples", "width"), [(5, 30), (40, 30), (500, 30), (3, 2), (20, 1)])
def test_covariances_are_shrunk_as_in_scikit_learn(examples: int, width: int) -> None:
    generator = np.random.default_rng(examples)
    vectors = generator.normal(size=(examples, width)) @ generator.normal(size=(width, width))
    expected, share = oas(vectors, assume_centered=True)
    assert width == 1 or share > 0
    found = shrunk(torch.from_numpy(vectors.T @ vectors / examples), examples)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)
