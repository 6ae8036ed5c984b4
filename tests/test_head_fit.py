"""A head fitted in closed form from sums that clients send."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.stats import multivariate_normal

import fedcustom
from fedcustom.aggregation.discriminant import class_moments, discriminant
from fedcustom.aggregation.settings import AggregationSettings
from fedcustom.data.examples import ClientData, Example
from fedcustom.errors import RecipeError, UpdateError
from fedcustom.methods import Answer, Client, State, Update, WeightTuning, client_labels
from fedcustom.recipe import load_recipe
from test_cohort import distance
from test_label_prior import skewed
from test_methods import classification_examples, make
from test_run import rows_of

ROUND: dict[str, Any] = {"fit_head_rounds": [1]}
WIDTH, LABELS = 32, 3


def sent(method: WeightTuning, clients: dict[str, Client]) -> tuple[State, list[Answer]]:
    """The method's first state, and the clients' answers in its first round."""
    state = method.start()
    tasks = method.ask(state, 1, {name: {"epochs": 1} for name in clients})
    answers = []
    for name, client in clients.items():
        update = method.work(tasks[name], client)
        method.check(tasks[name], update)
        answers.append(Answer(name, tasks[name], update))
    return state, answers


def inputs_of(method: WeightTuning, state: State, examples: list[Example]) -> np.ndarray[Any, Any]:
    """What goes into the last layer, from the model's own parts and one text at a time."""
    method.tuned.write(state.tensors)
    model = method.tuned.model.eval()
    tokenizer, rows = method.base.tokenizer, []
    for example in examples:
        batch = tokenizer(example.text, return_tensors="pt", truncation=True, max_length=24)
        with torch.no_grad():
            rows.append(model.bert(**batch).pooler_output[0])
    return torch.stack(rows).double().numpy()


def by_density(
    vectors: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], asked: np.ndarray[Any, Any], classes: int
) -> np.ndarray[Any, Any]:
    """log( share_c N(x; m_c, S + v I) / N(x; m, S + v I) ) of each asked x and each class c."""
    means = np.stack([vectors[labels == c].mean(axis=0) for c in range(classes)])
    rest = vectors - means[labels]
    shape = rest.T @ rest / (len(vectors) - classes) + vectors.var(axis=0).mean() * np.eye(vectors.shape[1])
    counts = np.bincount(labels, minlength=classes)
    shares = (counts + 0.5) / (len(labels) + 0.5 * classes)
    whole = multivariate_normal(vectors.mean(axis=0), shape).logpdf(asked)
    return np.stack(
        [
            multivariate_normal(means[c], shape).logpdf(asked) - whole + np.log(shares[c])
            for c in range(classes)
        ],
        axis=1,
    )


@pytest.mark.parametrize("technique", ["bitfit", "full"])
def test_logits_are_those_of_gaussians(tiny: dict[str, str], technique: str) -> None:
    """From clients with other labels each; what changes is the last layer alone."""
    method = make(tiny["bert"], technique, training=ROUND)
    clients = skewed()
    state, answers = sent(method, clients)
    merged = method.merge(state, iter(answers))
    examples = [example for client in clients.values() for example in client.data.train]
    asked = classification_examples(9)
    vectors = inputs_of(method, state, [*examples, *asked])
    labels = np.array([example.label for example in examples])
    expected = by_density(vectors[: len(examples)], labels, vectors[len(examples) :], LABELS)
    found = method.predict(merged, asked, texts=False).scores
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    changed = {name for name in state.tensors if not torch.equal(state.tensors[name], merged.tensors[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("technique", ["prefix", "lora", "soft_prompt", "adapter"])
def test_skew_makes_no_difference(tiny: dict[str, str], technique: str) -> None:
    """The clients' head is that of one client with all examples, alone or in a batch."""
    method = make(tiny["bert"], technique, training=ROUND)
    clients = skewed()
    state, answers = sent(method, clients)
    together = method.work_together([(a.task, clients[a.client]) for a in answers])
    for answer, update in zip(answers, together, strict=True):
        assert isinstance(update, Update)
        assert all(torch.equal(t, update.tensors[n]) for n, t in answer.update.tensors.items())
    everyone = [example for client in clients.values() for example in client.data.train]
    pooled = {"all": Client("all", ClientData("all", everyone))}
    one, other = (method.merge(state, iter(found)) for found in (answers, sent(method, pooled)[1]))
    heads = [Update({name: state.tensors[name] for name in method.tuned.head}) for state in (one, other)]
    # What the tiny model makes of a soft prompt hardly varies: its head magnifies float32's rounding.
    assert distance(*heads) < (2e-3 if technique == "soft_prompt" else 1e-5)


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


def damaged(update: Update, name: str, tensor: torch.Tensor) -> Update:
    return replace(update, tensors={**update.tensors, name: tensor})


def far_off_the_diagonal() -> torch.Tensor:
    """A triangle of zeros, but for one pair of inputs."""
    triangle = torch.zeros(WIDTH * (WIDTH + 1) // 2)
    triangle[1] = 1e6
    return triangle


def test_sums_that_nobody_has_are_refused(tiny: dict[str, str]) -> None:
    method = make(tiny["bert"], "prefix", training=ROUND)
    _, answers = sent(method, {"b": skewed()["b"]})
    task, update = answers[0].task, answers[0].update
    counts, totals, scatter = (update.tensors[n] for n in ("counts", "totals", "scatter"))
    assert {n: tuple(t.shape) for n, t in update.tensors.items()} == {
        "counts": (LABELS,), "totals": (LABELS, WIDTH), "scatter": (WIDTH * (WIDTH + 1) // 2,),
    }  # fmt: skip
    upwards = torch.tensor([-1, 1, 0])
    wrong = {
        "not the number of examples": damaged(update, "counts", counts + 1),
        "counts and totals": damaged(update, "counts", counts + upwards),
        "counts and totals are not": damaged(update, "totals", totals + 1),
        "the scatter is smaller in some": damaged(update, "scatter", scatter * 0.5),
        "smaller in some direction than the totals": damaged(update, "scatter", -scatter),
        "in some direction than": damaged(update, "scatter", scatter + far_off_the_diagonal()),
        "not finite": damaged(update, "scatter", scatter * torch.inf),
        "totals has dtype torch.float64": damaged(update, "totals", totals.double()),
        r"counts has shape \(4,\), not \(3,\)": damaged(update, "counts", torch.ones(4, dtype=torch.int64)),
        "wrong tensor names": Update({"counts": counts, "totals": totals}, update.weight),
        "is not the number": replace(update, weight=-1.0),
    }
    for message, answer in wrong.items():
        with pytest.raises(UpdateError, match=message):
            method.check(task, answer)


def test_only_what_the_recipe_asks_for_is_answered(tiny: dict[str, str]) -> None:
    """Whatever the server says: sums in a round of training, training in one of sums."""
    client = skewed()["c"]
    for rounds, kind in (([1], "train"), ([2], "fit head"), ([], "fit head")):
        method = make(tiny["bert"], "prefix", training={"fit_head_rounds": rounds})
        task = replace(method.ask(method.start(), 1, {"c": {"epochs": 1}})["c"], kind=kind)
        with pytest.raises(UpdateError, match=f"no task '{kind}' in round 1"):
            method.work(task, client)
        (answer,) = method.work_together([(task, client)])
        assert isinstance(answer, UpdateError)


def test_once_fitted_the_adjustment_is_relative_to_the_labels_of_all(tiny: dict[str, str]) -> None:
    """By Bayes' rule: a client's logits plus log(own share / everybody's); and nothing where it is alone."""
    method = make(tiny["bert"], "prefix", training={**ROUND, "logit_adjustment": 1.0})
    clients = skewed()
    state, answers = sent(method, clients)
    state = method.merge(state, iter(answers))
    labels = {name: [e.label for e in client.data.train] for name, client in clients.items()}
    together = [sum(rows.count(c) for rows in labels.values()) for c in range(LABELS)]
    assert state.values["label_counts"] == together
    for name, task in method.ask(state, 2, {name: {"epochs": 1} for name in clients}).items():
        everybody = (np.array(together) + 1) / (sum(together) + LABELS)
        own = (np.bincount(labels[name], minlength=LABELS) + LABELS * everybody) / (
            len(labels[name]) + LABELS
        )
        offset = method._label_offset(task, clients[name])
        assert offset is not None
        assert offset.numpy() == pytest.approx(np.log(own / everybody), rel=1e-5)
        for wrong in ([1, 2], [1, 2, -3], [1, 2, True], [1, 2, 3.0], "123"):
            with pytest.raises(UpdateError, match=r"label_counts .* must be 3 whole numbers"):
                method.work(replace(task, values={**task.values, "label_counts": wrong}), clients[name])
    method.context = replace(method.context, keeps="everything")
    assert method._label_offset(task, clients[name]) is None


def test_a_fit_to_few_clients_is_none(tiny: dict[str, str]) -> None:
    """Where fewer than half of those asked answer, the head and what is known of labels stay."""
    for answering, asked, fitted in ((1, 4, False), (2, 4, True), (1, 2, True)):
        training = ROUND if asked == 4 else {**ROUND, "fit_head_clients": asked}
        method = make(tiny["bert"], "prefix", training=training, clients=4)
        clients = {name: client for name, client in skewed().items() if name in ("b", "c")[-answering:]}
        state, answers = sent(method, clients)
        after = method.merge(state, iter(answers))
        assert ("label_counts" in after.values) == fitted
        assert all(torch.equal(after.tensors[n], state.tensors[n]) for n in state.tensors) == (not fitted)
        told = {
            name: np.bincount([e.label for e in client.data.train], minlength=LABELS).tolist()
            for name, client in clients.items()
        }
        assert client_labels(after) == told
        if not fitted:
            assert after.values["method"] == {"head": "not fitted: 1 of 4 clients answered"}


@pytest.mark.parametrize("optimizer", ["fedavgm", "fedadam"])
def test_a_former_head_is_forgotten(tiny: dict[str, str], optimizer: str) -> None:
    """By the server's optimiser and, in a centralised run, by the client's."""
    settings = AggregationSettings(server_optimizer=optimizer)  # type: ignore[arg-type]
    method = make(tiny["bert"], "bitfit", training={"fit_head_rounds": [2]}, aggregation=settings)
    method.context = method.ownership.context = replace(method.context, keeps="optimizer")
    client, state = skewed()["c"], method.start()
    for number in (1, 2):
        task = method.ask(state, number, {"c": {"epochs": 1}})["c"]
        state = method.merge(state, iter([Answer("c", task, method.work(task, client))]))
        if number == 1:
            state = replace(state, values={"method": "of round 1"})
        head = {n: t for n, t in state.server.items() if "classifier" in n}
        assert head
        assert all(bool(t.any()) == (number == 1) for t in head.values())
        assert any("classifier" in name for name in client.memory.tensors) == (number == 1)
    assert any(t.any() for t in state.server.values())
    assert any("moments/" in name for name in client.memory.tensors)
    assert state.values == {"label_counts": [2, 3, 4]}
    task = method.ask(state, 3, {"c": {"epochs": 1}})["c"]
    method.check(task, method.work(task, client))


def test_poisoned_examples_have_sums_like_others(small: dict[str, Any], tmp_path: Path) -> None:
    overrides = {"training.fit_head_rounds": [1], "attack.kind": "label_flip", "attack.fraction": 0.5,
                 "attack.boost": 3.0}  # fmt: skip
    run = fedcustom.run(small, overrides, out=tmp_path / "run")
    assert [len(row["answered"]) for row in rows_of(run.directory)[1:]] == [4, 4]


@pytest.mark.parametrize("compressed", [False, True])
def test_a_whole_run(small: dict[str, Any], tmp_path: Path, compressed: bool) -> None:
    """All four clients are asked where a round has two, and their sums travel as they are."""
    recipe = {**small, "rounds": {"count": 3, "clients_per_round": 2, "checkpoint_every": 1}}
    overrides: dict[str, Any] = {"training.fit_head_rounds": [1, -1], "evaluation.select": "last"}
    if compressed:
        overrides |= {"compression.kind": "int8", "compression.down": True}
    run = fedcustom.run(recipe, overrides, out=tmp_path / "run")
    rows = rows_of(run.directory)[1:]
    assert [len(row["answered"]) for row in rows] == [4, 2, 4]
    assert [row["train_loss"] is None for row in rows] == [True, False, True]
    numbers = 8 * LABELS + 4 * LABELS * WIDTH + 4 * WIDTH * (WIDTH + 1) // 2
    for row in (rows[0], rows[2]):
        assert max(row["bytes_up"].values()) == pytest.approx(numbers, abs=400)


def test_a_head_that_is_fitted_alone_never_trains(small: dict[str, Any], tmp_path: Path) -> None:
    overrides: dict[str, Any] = {"training.fit_head_rounds": [1], "training.freeze_head_rounds": 9,
                                 "evaluation.select": "last", "rounds.count": 1}  # fmt: skip
    heads = []
    for rounds in (2, 3):
        run = fedcustom.run(small, {**overrides, "rounds.count": rounds}, out=tmp_path / str(rounds))
        tensors = load_file(run.directory / "model" / "adapter_model.safetensors")
        heads.append({name: tensor for name, tensor in tensors.items() if "classifier" in name})
    assert heads[0]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])


def test_baselines(small: dict[str, Any], tmp_path: Path) -> None:
    """Centralised, the sums are one client's; locally each client has a head of its own."""
    overrides: dict[str, Any] = {"training.fit_head_rounds": [1], "evaluation.select": "last"}
    for baseline in ("centralised", "local"):
        run = fedcustom.run(small, {**overrides, "baseline": baseline}, out=tmp_path / baseline)
        assert [row["train_loss"] is None for row in rows_of(run.directory)[1:]] == [True, False]


def test_a_local_head(tiny: dict[str, str]) -> None:
    method = make(tiny["bert"], "bitfit", training=ROUND)
    alone = make(tiny["bert"], "bitfit", training=ROUND)
    alone.context = alone.ownership.context = replace(alone.context, keeps="everything")
    alone.ownership.initial = alone.tuned.read()
    client = skewed()["c"]
    state, answers = sent(method, {"c": skewed()["c"]})
    expected = method.merge(state, iter(answers)).tensors
    task = alone.ask(alone.start(), 1, {"c": {"epochs": 1}})["c"]
    update = alone.work(task, client)
    alone.check(task, update)
    assert not update.tensors
    own = {name.removeprefix("state/"): t for name, t in client.memory.tensors.items()}
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], expected[name]) for name in own)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"training.fit_head_rounds": [0]},
            r"_rounds = \[0\]: must be different rounds from 1 to .* 20",
        ),
        ({"training.fit_head_rounds": [1, 1]}, "must be different rounds"),
        ({"training.fit_head_rounds": [-1, 20]}, "must be different rounds"),
        ({"training.fit_head_rounds": [-2]}, "or -1"),
        ({"training.freeze_head_rounds": 20}, "or the head fitted"),
        ({"training.fit_head_rounds": [1], "rounds.count": 1}, "leaves no round"),
        ({"training.fit_head_rounds": [1], "aggregation.rule": "median"}, "needs aggregation.rule = 'mean'"),
        ({"training.fit_head_rounds": [1], "aggregation.correction": "feddyn"}, "correction = 'none'"),
        ({"training.fit_head_rounds": [1], "participation.buffer": 2}, "participation.buffer"),
        ({"training.fit_head_rounds": [1], "personalisation.keep": ["head"]}, r"keep = \['head'\]"),
        (
            {"training.fit_head_rounds": [1], "attack.kind": "alie"},
            "'alie' is defined for changes, not",
        ),
        (
            {"training.fit_head_rounds": [1], "method.name": "lora", "method.variant": "rolora"},
            "'rolora' needs every round",
        ),
        ({"training.fit_head_rounds": [1], "data.task": "generation"}, "needs labels"),
    ],
)
def test_bad_input(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe({}, overrides)


def test_a_compiled_model(tiny: dict[str, str]) -> None:
    """Compiled before or after: the sums are the same, and nothing of them stays in the model."""
    expected = sent(make(tiny["bert"], "prefix", training=ROUND), skewed())[1]
    method = make(tiny["bert"], "prefix", training=ROUND)
    method.tuned.model.compile(backend="eager", dynamic=True)
    method.predict(method.start(), classification_examples(3), texts=False)
    for _ in range(2):
        for one, other in zip(expected, sent(method, skewed())[1], strict=True):
            assert all(torch.equal(t, other.update.tensors[n]) for n, t in one.update.tensors.items())
    assert not method.head_fit.layer._forward_pre_hooks


def test_a_head_without_a_bias(tiny: dict[str, str]) -> None:
    with pytest.raises(RecipeError, match="does not end in a layer with a bias"):
        make(tiny["llama"], "prefix", training=ROUND)


def test_a_bias_that_stays_with_its_client(small: dict[str, Any], tmp_path: Path) -> None:
    overrides = {
        **{f"training.{k}": v for k, v in ROUND.items()},
        "personalisation.keep": ["classifier.bias"],
    }
    with pytest.raises(RecipeError, match="a head that stays with the clients"):
        fedcustom.run(small, overrides, out=tmp_path / "run")
