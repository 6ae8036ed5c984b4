"""What a client lets into what it sends for the head: by rule, by brute force, and against attacks."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from fedcustom.aggregation.discriminant import class_moments
from fedcustom.aggregation.logistic import loss_and_gradient, probabilities
from fedcustom.core.errors import UpdateError
from fedcustom.data.examples import ClientData, Example
from fedcustom.methods import UNFINISHED, Client, Update, WeightTuning, client_labels
from fedcustom.methods.tuning.head_disclosure import counted_rows, sends_gradient, sends_scatter, text_numbers
from fedcustom.methods.tuning.head_messages import POINT, Sums, sums_of
from fedcustom.methods.tuning.messages import HeadGradientTask, ScaleHeadTask
from helpers.head_fit import GUARDED, LABELS, ROUND, WIDTH, aggregate_of, alone_with, asked, fitted
from helpers.methods import classification_examples, make
from helpers.rounds import distance


def test_labels_of_few_texts_are_withheld(tiny: dict[str, str]) -> None:
    """From all that is sent; a client that has no others sends its label counts alone."""
    method = make(tiny["bert"], "bitfit", training=GUARDED)
    clients = many(4)
    expected = fitted(method, clients).tensors
    more = {**clients, "d": alone_with(2)}
    state = method.initialise()
    tasks, answers = asked(method, state, more)
    sent = answers[-1].update
    assert sent.tensors["counts"].tolist() == [2, 1, 0]
    assert sent.tensors["counted"].tolist() == [0, 0, 0]
    assert sent.tensors["totals"].numel() == sent.tensors["factor"].numel() == 0
    assert sent.weight == 3
    point = {POINT: torch.ones(3, WIDTH + 1)}
    for step in (ScaleHeadTask(point, round_number=1), HeadGradientTask(point, round_number=1)):
        after = method.execute(step, more["d"])
        assert isinstance(after, Update)
        assert after.weight == 0
        assert not any(tensor.any() for tensor in after.tensors.values())
    kinds = [tasks["d"].kind]
    while True:
        merged = method.aggregate(state, iter(answers))
        state = merged.state
        if UNFINISHED not in state.values:
            break
        tasks, answers = asked(method, state, more)
        assert tasks.keys() <= clients.keys(), "it is asked no further"
        kinds.append(next(iter(tasks.values())).kind)
    assert kinds[:3] == ["fit head", "scale head", "head gradient"]
    assert client_labels(state)["d"] == [2, 1, 0]
    withheld = 3 + sum(1 + at % 2 for at in range(1, 4))
    number = sum(len(client.data.train) for client in more.values())
    said = f"labels of 4 clients with fewer than 3 texts withheld: {withheld} of {number} rows"
    assert said in str(merged.report)
    heads = [Update({n: tensors[n] for n in method.trainable.head}) for tensors in (expected, state.tensors)]
    assert distance(*heads) < 0.2  # the shares of labels, in the bias


def first_sums(method: WeightTuning, clients: dict[str, Client]) -> list[Update]:
    return [answer.update for answer in asked(method, method.initialise(), clients)[1]]


def test_nothing_is_withheld_where_the_recipe_says_so(tiny: dict[str, str]) -> None:
    method = make(tiny["bert"], "bitfit", training={**ROUND, "fit_head_least_texts": 1})
    (sent,) = first_sums(method, {"d": alone_with(2)})
    assert {name: tuple(t.shape) for name, t in sent.tensors.items()} == {
        "counts": (3,), "counted": (3,), "totals": (2, WIDTH), "factor": (3 * WIDTH - 3,),
    }  # fmt: skip


def test_withheld_labels_alone_fit_nothing(tiny: dict[str, str]) -> None:
    method = make(tiny["bert"], "bitfit", training=GUARDED)
    before = method.initialise()
    merged = aggregate_of(method, {"d": alone_with(1)}, before)
    assert all(torch.equal(merged.state.tensors[n], t) for n, t in before.tensors.items())
    assert merged.state.values == {}
    assert merged.report == {
        "head": "not fitted: labels of 1 clients with fewer than 3 texts withheld: 2 of 2 rows, "
        "among them all of 2 of 2 labels"
    }


# --- by brute force: nothing that is sent depends on a withheld text ---


def everything_sent(method: WeightTuning, client: Client, vectors: torch.Tensor) -> list[Update]:
    """A client's answers of a whole round, of texts with these vectors, at heads as they come."""
    state, found = method.initialise(), []
    generator = torch.Generator().manual_seed(0)
    method.client.head.read = {client.name: vectors}
    _, answers = asked(method, state, {client.name: client})
    found.append(answers[0].update)
    for kind in (ScaleHeadTask, *[HeadGradientTask] * 4):
        point = 0.1 * torch.randn(LABELS, WIDTH + 1, generator=generator)
        update = method.execute(kind({POINT: point}, round_number=1), client)
        assert isinstance(update, Update)
        found.append(update)
    return found


def client_of(counts: tuple[int, ...], pool: list[Example], start: int = 0) -> Client:
    """A client with so many texts of each label, from the pool's ``start``-th of each on."""
    of = [[example for example in pool if example.label == label] for label in range(len(counts))]
    rows = [own for label, count in enumerate(counts) for own in of[label][start : start + count]]
    return Client("d", ClientData("d", rows))


def same(one: Update, other: Update) -> bool:
    """To the bit, weight and objective included."""
    tensors = all(torch.equal(tensor, other.tensors[n]) for n, tensor in one.tensors.items())
    return tensors and one == replace(other, tensors=one.tensors)


@pytest.mark.parametrize("counts", [(12, 1, 0), (12, 2, 1), (1, 2, 0), (2, 14, 2), (9, 9, 1)])
def test_nothing_that_is_sent_depends_on_a_withheld_text(
    tiny: dict[str, str], counts: tuple[int, ...]
) -> None:
    """Whatever its vector: all answers stay the same to the bit. Those of any other text are in the sums."""
    method = make(tiny["bert"], "bitfit", training=GUARDED)
    client, generator = client_of(counts, classification_examples(90)), torch.Generator().manual_seed(1)
    vectors = torch.randn(len(client.data.train), WIDTH, generator=generator)
    expected = everything_sent(method, client, vectors)
    assert any(update.tensors.get("gradient", torch.zeros(1)).any() for update in expected) == (
        sum(count for count in counts if count >= 3) >= 3 * LABELS
    )
    for at, row in enumerate(client.data.train):
        other = vectors.clone()
        other[at] = 1e3 * torch.randn(WIDTH, generator=generator)
        found = everything_sent(method, client, other)
        kept = all(same(one, two) for one, two in zip(expected, found, strict=True))
        assert kept == (counts[row.label] < 3)


def test_differences_do_not_have_a_withheld_text(tiny: dict[str, str]) -> None:
    """All rows' total is in the bias and the gradient of no answer: at a head of zeros a gradient has the
    totals of all labels, and these are those of the counted rows.
    """
    method = make(tiny["bert"], "bitfit", training=GUARDED)
    client = client_of((12, 12, 1), classification_examples(90))
    (first,) = (answer.update for answer in asked(method, method.initialise(), {"d": client})[1])
    zero = HeadGradientTask({POINT: torch.zeros(LABELS, WIDTH + 1)}, round_number=1)
    gradient = method.execute(zero, client).tensors["gradient"]
    everything = LABELS * gradient[2, :-1]  # where nobody of the label is counted: the mean of all that are
    totals = first.tensors["totals"]
    torch.testing.assert_close(everything, totals.sum(dim=0), rtol=1e-4, atol=1e-4)
    assert float(LABELS * gradient[2, -1]) == pytest.approx(24, rel=1e-5)
    torch.testing.assert_close(everything / LABELS - gradient[0, :-1], totals[0], rtol=1e-4, atol=1e-4)


def test_the_only_text_of_a_label_was_in_the_gradient_before(tiny: dict[str, str]) -> None:
    """That attack finds the text where nothing is withheld, so that the test above tests something."""
    method = make(tiny["bert"], "bitfit", training=ROUND)
    client = client_of((12, 12, 1), classification_examples(90))
    asked(method, method.initialise(), {"d": client})
    zero = HeadGradientTask({POINT: torch.zeros(LABELS, WIDTH + 1)}, round_number=1)
    gradient = method.execute(zero, client).tensors["gradient"]
    rows = method.client.head.rows["d"].vectors
    everything = rows.sum(dim=0)
    torch.testing.assert_close(everything / LABELS - gradient[2, :-1], rows[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attack", ["total", "difference"])
def test_heads_that_single_out_a_text_are_not_answered(tiny: dict[str, str], attack: str) -> None:
    """A server may choose any heads. Of one that gives all texts label 2 but for one, the gradient's row 1
    plus that label's total is the text; so is the difference from that of a head without the exception.
    """
    client = client_of((12, 12, 12), classification_examples(90))
    for training, found in ((ROUND, True), (GUARDED, False)):
        method = make(tiny["bert"], "bitfit", training=training)
        generator, victim = torch.Generator().manual_seed(1), 5
        vectors = torch.randn(36, WIDTH, generator=generator)
        method.client.head.read = {"d": vectors}
        (first,) = (answer.update for answer in asked(method, method.initialise(), {"d": client})[1])
        scores = vectors @ vectors[victim]
        rest = torch.cat([scores[:victim], scores[victim + 1 :]]).max()
        assert scores[victim] > rest
        plain = torch.zeros(LABELS, WIDTH + 1)
        plain[0, -1] = plain[1, -1] = -200.0
        sharp = 80 / float(scores[victim] - rest)
        aimed = plain.clone()
        aimed[1, :-1], aimed[1, -1] = sharp * vectors[victim], -sharp * float(scores[victim] + rest) / 2
        gradients = []
        for point in [plain, aimed] if attack == "difference" else [aimed]:
            update = method.execute(HeadGradientTask({POINT: point}, round_number=1), client)
            gradients.append(update.tensors["gradient"])
        row = gradients[-1][1, :-1]
        row = row - gradients[0][1, :-1] if attack == "difference" else row + first.tensors["totals"][1]
        assert torch.allclose(row, vectors[victim], atol=1e-3) == found
        assert bool(update.weight) == found
        zero = HeadGradientTask({POINT: torch.zeros(LABELS, WIDTH + 1)}, round_number=1)
        assert bool(method.execute(zero, client).weight) == found  # nor are others of this round


# --- the rules ---


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12)), min_size=1, max_size=60), st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_no_text_has_more_than_its_part_of_a_sum(rows: list[tuple[int, int]], least: int) -> None:
    labels, texts = (torch.tensor(column) for column in zip(*rows, strict=True))
    kept = counted_rows(labels, texts, 4, least)
    for label in range(4):
        own = [text for (of, text), keep in zip(rows, kept.tolist(), strict=True) if of == label and keep]
        everything = [text for of, text in rows if of == label]
        assert own in ([], everything)
        if own:
            assert max(Counter(own).values()) * least <= len(own)
            assert len(set(own)) >= least
        elif everything:
            assert max(Counter(everything).values()) * least > len(everything)


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 6))
def test_second_moments_leave_angles_for_each_text(number: int, labels: int, least: int) -> None:
    assume(labels <= number)
    of = torch.arange(number) % labels
    angles = len(list(itertools.combinations(range(number - labels), 2)))
    expected = least == 1 or angles >= least * number
    assert sends_scatter(of, torch.arange(number), least) == expected
    # A text that is there twice is one text.
    assert sends_scatter(of.repeat(2), torch.arange(number).repeat(2), least) == expected


@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 5), st.floats(0, 40))
@settings(max_examples=200, deadline=None)
def test_no_text_has_more_than_its_part_of_a_gradient(
    seed: int, number: int, least: int, size: float
) -> None:
    """Nor of a difference of gradients, or of what is left of one without the labels' totals."""
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randint(0, number, (number,), generator=generator)
    vectors = torch.randn(number, 6, generator=generator, dtype=torch.float64)[texts]
    labels = torch.randint(0, 3, (number,), generator=generator)
    heads = [size * torch.randn(3, 7, generator=generator, dtype=torch.float64) for _ in range(2)]
    first, second = (probabilities(head, vectors) for head in heads)
    truth = torch.eye(3, dtype=torch.float64)[labels]
    gradient = loss_and_gradient(heads[1], vectors, labels)[1]
    torch.testing.assert_close(gradient[:, :-1], (second - truth).T @ vectors)
    answered = sends_gradient(second, labels, texts, least, [first])
    if least == 1:
        assert answered
        return
    if len(set(texts.tolist())) < 3 * least:
        assert not answered
        return
    largest = 0.0
    for factors in (second, second - truth, second - first):
        for text in set(texts.tolist()):
            for column in range(3):
                whole = float(factors[:, column].abs().sum())
                own = float(factors[texts == text, column].abs().sum())
                largest = max(largest, own / whole if whole else 0.0)
    assert answered == (largest <= (1 + 1e-9) / least)


def test_texts_are_told_apart_as_the_model_reads_them(tiny: dict[str, str]) -> None:
    """What is cut off, and what the tokenizer does not keep, makes no other text."""
    method = make(tiny["bert"], "bitfit", training=GUARDED)
    rows = [
        "where is it",
        "where  is it",
        "why",
        "where is it",
        *["why " * 200 + end for end in ("is", "it")],
    ]
    tokens = method.tokens([Example(text, 0) for text in rows])
    numbers = text_numbers(tokens).tolist()
    equal = [[bool(np.array_equal(one.source, other.source)) for other in tokens] for one in tokens]
    assert equal == [[one == other for other in numbers] for one in numbers]
    assert numbers[0] == numbers[3] != numbers[2]
    assert numbers[4] == numbers[5]
    assert text_numbers([]).tolist() == []


def test_repeated_texts_are_withheld(tiny: dict[str, str]) -> None:
    method = make(tiny["bert"], "bitfit", training=GUARDED)
    pool = [e for e in classification_examples(90) if e.label == 0]
    for rows, counted in (
        ([pool[0]] * 9, 0),  # nine rows of one text
        ([*[pool[0]] * 9, *pool[1:3]], 0),  # which three texts do not hide
        ([*[pool[0]] * 2, *pool[1:5]], 6),
    ):
        (sent,) = first_sums(method, {"d": Client("d", ClientData("d", rows))})
        assert sent.tensors["counted"].tolist() == [counted, 0, 0]
        assert sent.tensors["counts"].tolist() == [len(rows), 0, 0]


# --- what the server makes of it ---


def many(number: int) -> dict[str, Client]:
    """Clients with a dozen texts of each of two labels, and one or two of the third, but for one client."""
    pool = classification_examples(800)
    clients = {}
    for at in range(number):
        counts = (12, 12, 1 + at % 2) if at else (12, 12, 30)
        clients[f"c{at}"] = replace(client_of(counts, pool, 12 * at), name=f"c{at}")
    return clients


def test_the_head_is_scikit_learns_of_the_counted_texts(tiny: dict[str, str]) -> None:
    """With the shares of labels of all texts, by Bayes' rule."""
    method = make(tiny["bert"], "bitfit", training={**GUARDED, "fit_head_steps": 1000, "fit_head_c": 5.0})
    clients = many(5)
    merged = aggregate_of(method, clients)
    method.trainable.write(method.initialise().tensors)
    counts = {n: Counter(e.label for e in client.data.train) for n, client in clients.items()}
    everything = [e for client in clients.values() for e in client.data.train]
    kept = [e for n, client in clients.items() for e in client.data.train if counts[n][e.label] >= 3]
    assert len(kept) < len(everything)
    vectors = method.client.head.inputs(method.tokens(kept)).double().numpy()
    labels = np.array([e.label for e in kept])
    c = 5.0 / (vectors**2).sum(axis=1).mean()
    theirs = LogisticRegression(C=c, tol=1e-12, max_iter=100_000).fit(vectors, labels)
    of_all, of_kept = (np.bincount([e.label for e in rows], minlength=3) for rows in (everything, kept))
    examples = classification_examples(9)
    asked_of = method.client.head.inputs(method.tokens(examples)).double().numpy()
    expected = theirs.decision_function(asked_of) + np.log((of_all + 0.5) / (of_kept + 0.5))
    found = method.predict(merged.state, examples, texts=False).scores
    np.testing.assert_allclose(
        found - found.mean(axis=1, keepdims=True), expected - expected.mean(axis=1, keepdims=True), atol=1e-2
    )
    few = len(everything) - len(kept)
    said = (
        f"fitted to {len(kept)} of {len(everything)} examples of 5 clients (labels of 4 clients with fewer "
    )
    assert merged.report["head"] == f"{said}than 3 texts withheld: {few} of {len(everything)} rows)"
    assert merged.state.values["label_counts"] == of_all.tolist()


def test_a_covariance_from_sums_is_that_of_rows_in_expectation() -> None:
    """Of clients that send sums alone: the same within-class covariance, from as many pieces as sums."""
    generator = np.random.default_rng(3)
    shape, means = np.diag([1.0, 4.0, 0.25]), np.array([[0.0, 1, 2], [3, 0, -1]])
    together = Sums.zero(2, 3)
    for _ in range(4000):
        labels = np.repeat([0, 1], [3, 4])
        rows = means[labels] + generator.normal(size=(7, 3)) @ np.sqrt(shape)
        sent = sums_of(torch.from_numpy(rows).float(), torch.from_numpy(labels), torch.arange(7), 2, 3)
        assert not sent["factor"].numel()
        together.add(sent)
    assert together.pieces == 8000
    assert together.sent.tolist() == [12000, 16000]
    found, within = class_moments(together.sent, together.totals, together.scatter, together.pieces)
    np.testing.assert_allclose(found.numpy(), means, atol=0.06)
    np.testing.assert_allclose(within.numpy(), shape, atol=0.2)
    exact = 28000 * shape + (means.T * np.array([12000, 16000])) @ means
    np.testing.assert_allclose(together.all_scatter().numpy(), exact, rtol=0.05, atol=1500)


def test_sums_that_contradict_their_counts_are_refused(tiny: dict[str, str]) -> None:
    method = make(tiny["bert"], "prefix", training=GUARDED)
    tasks, answers = asked(
        method, method.initialise(), {"d": client_of((3, 4, 1), classification_examples(90))}
    )
    update = answers[0].update
    assert not update.tensors["factor"].numel()
    counted, totals = update.tensors["counted"], update.tensors["totals"]
    for message, tensors in {
        "counted has more examples of a label": {"counted": counted + 1},
        "counted has more": {"counted": -counted},
        "totals has shape": {"counted": torch.zeros_like(counted)},
        "counted has shape": {"counted": torch.zeros(5, dtype=torch.int32)},
        "mean square is above": {"totals": totals * 1e8},
        "factor has shape": {"factor": torch.zeros(3)},
    }.items():
        with pytest.raises(UpdateError, match=message):
            method.check(tasks["d"], replace(update, tensors={**update.tensors, **tensors}))


def test_few_gradients_leave_the_discriminant(tiny: dict[str, str]) -> None:
    """Where clients with half of the examples send none, their logistic regression would be of the others."""
    method = make(tiny["bert"], "bitfit", training=GUARDED)
    pool = classification_examples(800)
    clients = {f"c{at}": replace(client_of((4, 4, 0), pool, 4 * at), name=f"c{at}") for at in range(9)}
    clients["big"] = replace(client_of((10, 10, 10), pool, 60), name="big")
    merged = aggregate_of(method, clients)
    assert "9 clients with few texts sent no second moments" in str(merged.report)
    assert "gradients came of 30 of 102 examples only" in str(merged.report)
    assert "kept the discriminant" in str(merged.report)
    assert UNFINISHED not in merged.state.values


def test_a_baseline_withholds_nothing(tiny: dict[str, str]) -> None:
    method = make(tiny["bert"], "bitfit", training=GUARDED, keeps="optimizer")
    (sent,) = first_sums(method, {"d": alone_with(1)})
    assert sent.tensors["counted"].tolist() == [1, 1, 0]
