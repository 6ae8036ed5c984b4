"""The fit of the head from sums over clients alone: against scikit-learn and plain sums, which labels take
part, and what a client or a server refuses.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from fedcustom.core.errors import AggregationError, UpdateError
from fedcustom.data.examples import ClientData
from fedcustom.methods import UNFINISHED, Aggregate, Answer, Client, State, Task, WeightTuning, Work
from fedcustom.methods.tuning.head_messages import TEMPERATURES
from fedcustom.methods.tuning.messages import (
    CountLabelsTask,
    FitHeadTask,
    SumGradientsTask,
    SumVectorsTask,
)
from fedcustom.methods.tuning.summed_head import (
    LONGEST,
    NEEDED,
    NEVER,
    LabelTotals,
    SumTerms,
    needed_place,
    shortened,
    wanted_examples,
)
from fedcustom.privacy.secure_sum.integers import zeros
from fedcustom.privacy.secure_sum.terms import Terms
from fedcustom.transport.secure import ChangeVector
from fedcustom.transport.summed import Summation
from helpers.head_fit import LABELS, WIDTH
from helpers.methods import classification_examples, make

CHANGES = ChangeVector(16.0, 8, None, 0)


def summed(
    tiny: dict[str, str], *, owners: int = 3, alone: int = 1, clients: int = 4, **training: Any
) -> WeightTuning:
    settings = {"fit_head_rounds": [1], "fit_head_steps": 20, **training}
    return make(tiny["bert"], "probe", training=settings, clients=clients, sum_terms=SumTerms(owners, alone))


def clients_of(sizes: list[int]) -> dict[str, Client]:
    pool, found, start = classification_examples(sum(sizes)), {}, 0
    for number, size in enumerate(sizes):
        name = f"c{number}"
        found[name] = Client(name, ClientData(name, pool[start : start + size]))
        start += size
    return found


def exchange(
    made: WeightTuning, state: State, clients: dict[str, Client], *, gone: tuple[str, ...] = ()
) -> tuple[Task, list[Answer]]:
    """One exchange, whose answers are added up as integers; none where a client is gone in a further one."""
    tasks = made.configure(state, 1, {name: Work(epochs=1) for name in clients})
    task = next(iter(tasks.values()))
    vector = Summation.of(made, CHANGES, Terms()).vector(task)
    total, answered = zeros(vector.length, vector.bits), []
    for name, asked in tasks.items():
        if name in gone:
            continue
        update = made.execute(asked, clients[name])
        made.check(asked, update)
        total = total + vector.encode(update, name, 3)
        answered.append(name)
    if gone and task.continues:
        return task, []
    reply = vector.opened(total, tuple(answered))
    assert reply.update is not None
    return task, [Answer("(sum)", task, reply.update, summed=tuple(answered))]


def whole_round(made: WeightTuning, clients: dict[str, Client], gone_in: str = "") -> list[Aggregate]:
    """All exchanges of a round; the first client is gone from that kind of task on."""
    state, found, gone = made.initialise(), list[Aggregate](), tuple[str, ...]()
    while True:
        if gone_in and str(state.values.get(UNFINISHED, CountLabelsTask.kind)) == gone_in:
            gone = ("c0",)
        found.append(made.aggregate(state, iter(exchange(made, state, clients, gone=gone)[1])))
        if gone and gone_in == CountLabelsTask.kind:  # who does not answer at first is not asked again
            clients, gone, gone_in = {n: c for n, c in clients.items() if n not in gone}, (), ""
        state = found[-1].state
        if UNFINISHED not in state.values:
            return found


def vectors_of(made: WeightTuning, clients: dict[str, Client]) -> tuple[np.ndarray, np.ndarray]:
    examples = [example for client in clients.values() for example in client.data.train]
    return (
        made.client.head.inputs(made.tokens(examples)).double().numpy(),
        np.array([example.label for example in examples]),
    )


def test_it_is_scikit_learns_logistic_regression(tiny: dict[str, str]) -> None:
    made, clients = summed(tiny, fit_head_least_texts=1, fit_head_steps=400), clients_of([30, 50, 21, 40])
    states = whole_round(made, clients)
    vectors, labels = vectors_of(made, clients)
    penalty = float(np.mean(np.sum(vectors**2, axis=1)))
    found = LogisticRegression(C=10 / penalty, max_iter=20_000, tol=1e-8).fit(vectors, labels)
    head = {name.rpartition(".")[2]: states[-1].state.tensors[name] for name in made.head_fit.names}
    mine = vectors @ head["weight"].double().numpy().T + head["bias"].double().numpy()
    theirs = found.decision_function(vectors)
    mine, theirs = (each - each.mean(axis=1, keepdims=True) for each in (mine, theirs))
    assert np.abs(mine - theirs).max() < 0.02 * np.abs(theirs).max()
    assert (mine.argmax(axis=1) == theirs.argmax(axis=1)).mean() > 0.98
    assert states[-1].state.values["label_counts"] == np.bincount(labels, minlength=LABELS).tolist()


def test_the_sums_are_those_of_all_vectors(tiny: dict[str, str]) -> None:
    """Totals, second moments and losses as the server gets them, against numpy."""
    made, clients = summed(tiny, fit_head_least_texts=1), clients_of([30, 50, 21, 40])
    state = made.initialise()
    state = made.aggregate(state, iter(exchange(made, state, clients)[1])).state
    _, (answer,) = exchange(made, state, clients)
    vectors, labels = vectors_of(made, clients)
    tensors = answer.update.tensors
    steps = (len(labels) * LONGEST) / 2**62 * 8  # of eight roundings, each less than a step
    for label in range(LABELS):
        wanted = vectors[labels == label].sum(axis=0)
        assert np.abs(tensors["totals"][label].numpy() - wanted).max() < steps + 1e-9
    rows, columns = np.triu_indices(WIDTH)
    wanted = (vectors.T @ vectors)[rows, columns]
    assert np.abs(tensors["scatter"].numpy() - wanted).max() < steps * LONGEST + 1e-9
    assert tensors["counted"].tolist() == np.bincount(labels).tolist()
    assert answer.update.weight == len(labels)
    state = made.aggregate(state, iter([answer])).state
    _, (losses,) = exchange(made, state, clients)
    head = {name.rpartition(".")[2]: state.tensors[name].double().numpy() for name in made.head_fit.names}
    logits = vectors @ head["weight"].T + head["bias"]
    for scale, loss in zip(TEMPERATURES, losses.update.tensors["losses"].tolist(), strict=True):
        scaled = scale * logits
        wanted = (np.log(np.exp(scaled).sum(axis=1)) - scaled[np.arange(len(labels)), labels]).sum()
        assert loss == pytest.approx(wanted, rel=1e-5)


def test_labels_that_are_rare_in_all_are_left_out(tiny: dict[str, str]) -> None:
    """A label of two clients, and one whose texts are too few, enter the counts and nothing else."""
    pool = classification_examples(120)
    by = [[example for example in pool if example.label == label] for label in range(LABELS)]
    parts = [
        [*by[0][:6], *by[1][:5]],
        [*by[0][6:12], *by[1][5:9]],
        [*by[0][12:20], by[2][0]],
        [*by[0][20:26], by[2][1], by[2][2]],
        [*by[0][26:30], *[replace(by[2][3])] * 4],  # one text four times: asks for 3 x 4 of the label
    ]
    clients = {f"c{n}": Client(f"c{n}", ClientData(f"c{n}", part)) for n, part in enumerate(parts)}
    made = summed(tiny, clients=5)
    state = made.initialise()
    first = made.aggregate(state, iter(exchange(made, state, clients)[1]))
    assert not first.may_end
    task, (answer,) = exchange(made, first.state, clients)
    assert isinstance(task, SumVectorsTask)
    assert task.owners == (5, 2, 3)
    assert task.counted == (30, 9, 7)
    assert task.needed[2] == 12
    assert answer.update.tensors["totals"].shape == (1, WIDTH)
    assert answer.update.tensors["counted"].tolist() == [30, 0, 0]
    after = made.aggregate(first.state, iter([answer]))
    said = after.report["head"]
    assert (
        "labels that fewer than 3 clients have, or of fewer texts than these ask for, left out: all" in said
    )
    assert "all of 2 labels, 16 of 46 rows" in said
    assert "the head is trained further" in said
    alone = summed(tiny, clients=5, owners=2)  # nobody helps the server: two clients are enough
    state = alone.initialise()
    state = alone.aggregate(state, iter(exchange(alone, state, clients)[1])).state
    assert exchange(alone, state, clients)[1][0].update.tensors["counted"].tolist() == [30, 9, 0]


def test_a_site_may_go_by_its_own_examples_alone(tiny: dict[str, str]) -> None:
    """Labels of which it has fewer texts than its minimum are in its counts, and in no sum; it sends no
    gradient in which one of its texts would stand out, and no second moments that could be solved."""
    pool = classification_examples(120)
    by = [[example for example in pool if example.label == label] for label in range(LABELS)]
    parts = [[*by[0][8 * n : 8 * n + 8], *by[1][8 * n : 8 * n + 8], by[2][n]] for n in range(3)]
    clients = {f"c{n}": Client(f"c{n}", ClientData(f"c{n}", part)) for n, part in enumerate(parts)}
    made = summed(tiny, clients=3, alone=5)
    state = made.initialise()
    _, (counts,) = exchange(made, state, clients)
    assert counts.update.tensors["counts"].tolist() == [24, 24, 3]
    assert counts.update.tensors["counted"].tolist() == [24, 24, 0]
    states = whole_round(made, clients)
    assert "gradients came of 0 of 48 examples only; kept the discriminant" in states[-1].report["head"]


def test_a_client_that_is_lost(tiny: dict[str, str]) -> None:
    clients = clients_of([30, 30, 30, 30])
    with pytest.raises(AggregationError, match="the clients' vectors were not summed"):
        whole_round(summed(tiny), clients, gone_in="sum vectors")
    made = summed(tiny)
    kept = whole_round(made, clients, gone_in="sum gradients")
    assert "not all clients went on; kept what was fitted before" in kept[-1].report["head"]
    fewer = whole_round(made, clients, gone_in="count labels")
    assert "fitted to 90 examples of 3 clients, of which sums alone are seen" in fewer[-1].report["head"]


def test_no_client_believes_totals_below_its_own_part(tiny: dict[str, str]) -> None:
    """Nor a task of a run without secure sums; nor more steps than the recipe has."""
    made, clients = summed(tiny), clients_of([30, 30, 30, 30])
    client = clients["c0"]
    with pytest.raises(UpdateError, match="the vectors of this round are gone"):
        made.execute(told(LABELS, 100, 3, 4), client)
    state = made.initialise()
    made.execute(made.configure(state, 1, {"c0": Work(epochs=1)})["c0"], client)
    for counted, needed, owners in ((1, 3, 4), (100, 1, 4), (100, 3, 0)):
        with pytest.raises(UpdateError, match="label 0: the totals that the server tells are less than"):
            made.execute(told(LABELS, counted, needed, owners), client)
    with pytest.raises(UpdateError, match="a task tells totals of 2 labels; there are 3"):
        made.figure_forms(told(2, 100, 3, 4))
    with pytest.raises(UpdateError, match=r"'fit head' does not go with secure_sum.on = true"):
        made.execute(FitHeadTask(state.tensors, round_number=1), client)
    point = {"head_point": torch.zeros(LABELS, WIDTH + 1)}
    with pytest.raises(UpdateError, match=r"step 21: training.fit_head_steps = 20"):
        made.execute(SumGradientsTask(point, round_number=1, examples=120, step=21), client)
    open_one = make(tiny["bert"], "probe", training={"fit_head_rounds": [1]}, clients=4)
    assert not any(kind.startswith("sum") for kind in open_one.messages)
    assert {"fit head", "scale head", "head gradient"}.isdisjoint(made.messages)
    with pytest.raises(UpdateError, match=r"'sum vectors' does not go with secure_sum.on = false"):
        open_one.execute(told(LABELS, 100, 3, 4), client)


def told(labels: int, counted: int, needed: int, owners: int) -> SumVectorsTask:
    return SumVectorsTask(
        round_number=1, counted=(counted,) * labels, needed=(needed,) * labels, owners=(owners,) * labels
    )


def test_the_server_refuses_sums_that_are_none(tiny: dict[str, str]) -> None:
    made, clients = summed(tiny), clients_of([30, 30, 30, 30])
    state = made.initialise()
    _, (answer,) = exchange(made, state, clients)
    tensors = answer.update.tensors
    for changed, message in (
        ({"counts": tensors["counts"] + 1}, "not those of the examples"),
        ({"counted": tensors["counts"] + 1}, "not those of the examples"),
        ({"repeats": tensors["repeats"] * 2}, "not those of so many clients"),
        ({"repeats": tensors["repeats"] * 0}, "not those of so many clients"),
        ({"counts": -tensors["counts"]}, "counts has numbers below 0"),
        ({"counts": tensors["counts"].float()}, "counts is .* of torch.float32"),
        ({"more": tensors["counts"]}, "wrong tensor names: more"),
    ):
        update = replace(answer.update, tensors={**tensors, **changed})
        with pytest.raises(UpdateError, match=message):
            made.aggregate(state, iter([replace(answer, update=update)]))
    with pytest.raises(UpdateError, match="figures of single clients came"):
        made.aggregate(state, iter([replace(answer, summed=())]))
    state = made.aggregate(state, iter([answer])).state
    _, (answer,) = exchange(made, state, clients)
    tensors = answer.update.tensors
    for changed, message in (
        ({"counted": tensors["counted"] - 1}, "other examples than were counted"),
        ({"scatter": tensors["scatter"] / 2}, "smaller in some direction than the totals allow"),
        ({"totals": tensors["totals"] * torch.nan}, "not finite"),
    ):
        update = replace(answer.update, tensors={**tensors, **changed})
        with pytest.raises(UpdateError, match=message):
            made.aggregate(state, iter([replace(answer, update=update)]))


def test_numbers_that_may_be_asked_for() -> None:
    assert list(NEEDED) == sorted(set(NEEDED))
    for wanted in (*range(1, 200), 1000, 12345, NEEDED[-2]):
        found = NEEDED[needed_place(wanted)]
        assert wanted <= found <= max(wanted, 1.25 * wanted)
        assert wanted > 8 or found == wanted
    assert needed_place(10**9) == len(NEEDED) - 1
    repeats = torch.zeros(2, len(NEEDED), dtype=torch.int64)
    repeats[0, -1] = repeats[0, 2] = repeats[1, 4] = 1
    totals = LabelTotals.of(torch.tensor([10**9, 5]), repeats)
    assert totals.needed == (NEVER, 5)
    assert totals.admitted(1).tolist() == [False, True]
    texts, labels = torch.tensor([0, 0, 1, 2, 2, 2, 3]), torch.tensor([0, 0, 0, 1, 1, 1, 1])
    assert wanted_examples(labels, texts, 3) == {0: 6, 1: 9}
    assert wanted_examples(labels, texts, 1) == {0: 1, 1: 1}


def test_vectors_beyond_the_fixed_point_are_shortened_and_counted() -> None:
    vectors = torch.randn(5, 8)
    vectors[1] *= 1e6
    vectors[2, 0], vectors[3, 1] = torch.nan, torch.inf
    found, number = shortened(vectors)
    assert number == 3
    assert torch.equal(found[[0, 4]], vectors[[0, 4]])
    assert float(found[1].norm()) == pytest.approx(LONGEST)
    assert not found[2:4].any()


def test_no_sum_of_what_may_be_sent_wraps(tiny: dict[str, str]) -> None:
    """Eight clients at the largest sizes that their examples can have; one that claims more is refused."""
    made = summed(tiny)
    task = told(LABELS, 8, 3, 8)
    vector = Summation.of(made, CHANGES, Terms()).vector(task)
    forms = made.figure_forms(task)
    assert forms is not None
    examples, total = 24, zeros(vector.length, 64)
    for number in range(8):
        tensors = {
            name: torch.full(form.shape, 3 * form.bound / examples, dtype=torch.float64)
            if form.bound is not None else torch.full(form.shape, 3)
            for name, form in forms.items()
        }  # fmt: skip
        update = made.messages[task.kind].update(tensors, 3.0)
        total = total + vector.encode(update, f"c{number}", 3)
    reply = vector.opened(total, tuple("abcdefgh"))
    assert reply.update is not None
    for name, form in forms.items():
        wanted = 24.0 if form.bound is None else form.bound
        assert reply.update.tensors[name].double().max() == pytest.approx(wanted, rel=1e-12)
        assert reply.update.tensors[name].double().min() == pytest.approx(wanted, rel=1e-12)
    tensors["totals"] = tensors["totals"] * 10
    with pytest.raises(UpdateError, match="totals holds a number of size"):
        vector.encode(replace(update, tensors=tensors), "c0", 3)
    tensors["totals"] = tensors["totals"] * torch.nan
    with pytest.raises(UpdateError, match="totals holds a number of size nan"):
        vector.encode(replace(update, tensors=tensors), "c0", 3)
