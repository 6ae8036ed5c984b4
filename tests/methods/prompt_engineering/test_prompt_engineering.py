"""Prompt engineering in whole runs on tiny models: selection, in-context learning and black-box prompts, each
against the same rounds put together by hand.
"""

from __future__ import annotations

import json
import re
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedcustom
from fedcustom.core.errors import FedcustomError, ModelError, RecipeError, RunError, UpdateError
from fedcustom.core.seeds import name_seed
from fedcustom.data.build import build_data
from fedcustom.data.examples import Example, FederatedData
from fedcustom.data.tokens import example_order
from fedcustom.evaluation.settings import TEXT_METRICS
from fedcustom.federated.build import make_method
from fedcustom.federated.run_directory import Checkpoints
from fedcustom.methods import Client, State, Task, Update, Work, registry
from fedcustom.methods.messages import typed
from fedcustom.methods.prompt_engineering.black_box import BlackBox
from fedcustom.methods.prompt_engineering.in_context import InContext
from fedcustom.methods.prompt_engineering.messages import (
    AnswerQueriesUpdate,
    ScoreTask,
    ScoreUpdate,
    SearchUpdate,
)
from fedcustom.methods.prompt_engineering.selection import Selection
from fedcustom.models.load import load_base
from fedcustom.recipe.recipe import Recipe, load_recipe, to_toml
from fedcustom.transport.messages import values_of
from helpers.likelihoods import label_log_probability
from helpers.rows import make_rows, write_jsonl
from helpers.runs import rows_of, without_seconds

ENCODER = ["{label}", "a text about {label}", "the {label} is here"]
DECODER = ["{input} :", "text {input} near"]
STRATEGIES: dict[str, dict[str, Any]] = {
    "selection": {"examples": 6, "edits": 2, "breed": 2, "breed_every": 1},
    "in_context": {"strategy": "in_context", "demonstrations": 2, "shared_demonstrations": 1},
    "black_box": {
        "strategy": "black_box", "prompt_length": 3, "dimensions": 6, "local_generations": 2, "examples": 6,
    },
}  # fmt: skip


@pytest.fixture
def recipe(tiny: dict[str, str], tmp_path: Path) -> Any:
    """Makes recipes of small runs: three clients, three rounds."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", make_rows(90, 0))
    write_jsonl(folder / "test.jsonl", make_rows(20, 2))
    public = [
        {"text": f"{row['text']} {n}", "source": f"{row['source']} {n}"}
        for n, row in enumerate(make_rows(9, 5))
    ]
    write_jsonl(folder / "public.jsonl", public)

    def make(strategy: str, kind: str = "llama", task: str = "classification", **changes: Any) -> Recipe:
        method = {"name": "prompt_engineering", **STRATEGIES[strategy]}
        if strategy == "in_context":
            method["retriever"] = tiny["bert"]
        if task == "classification":
            method["instructions"] = ENCODER if kind == "bert" else DECODER
        data = {"source": str(folder), "test": "test", "max_length": 16, "task": task}
        if task == "generation":
            data |= {"prompt": "{source}", "target": " {target}", "max_target_length": 12}
        values: dict[str, Any] = {
            "model": {"base": tiny[kind]},
            "data": data,
            "clients": {"partition": "iid", "count": 3},
            "method": method,
            "rounds": {"count": 3},
            "evaluation": {"batch_size": 16, "select": "last", "max_new_tokens": 5},
        }
        if strategy == "in_context":
            values["public"] = {"source": str(folder), "split": "public"}
        return load_recipe(load_recipe(values), changes)

    return make


def built(recipe: Recipe) -> tuple[Any, FederatedData]:
    """The recipe's method, and its data."""
    data = build_data(recipe.data, recipe.clients, recipe.seed, recipe.public)
    return make_method(recipe, load_base(recipe.model, data.task, recipe.seed, head=False), data), data


def last_state(run: fedcustom.Run) -> State:
    return Checkpoints(run.directory / "checkpoints").load(run.summary["best_round"]).state


KINDS = [
    (strategy, kind)
    for strategy in STRATEGIES
    for kind in ("bert", "llama", "gpt2", "bart")
    if (strategy, kind) not in {("in_context", "bert"), ("black_box", "bart")}
]


@pytest.mark.parametrize(("strategy", "kind"), KINDS, ids=["-".join(entry) for entry in KINDS])
def test_runs_on_every_kind_of_model(recipe: Any, tmp_path: Path, strategy: str, kind: str) -> None:
    """The result is the same after it was written and opened again, and the weights are the base model's."""
    run = fedcustom.run(recipe(strategy, kind), out=tmp_path / "run")
    texts = ["the old cat", "a {input} with {label}"]
    method, _ = built(run.recipe)
    examples = [Example(text, label=0) for text in texts]
    scores = method.predict(last_state(run), examples, texts=False).scores
    odds = np.exp(scores - scores.max(axis=1, keepdims=True))
    said = run.predict(texts)
    for row, found in zip(odds / odds.sum(axis=1, keepdims=True), said, strict=True):
        np.testing.assert_allclose(list(found["probabilities"].values()), row, rtol=1e-4)
    base = method.base.model.state_dict()
    kept = run.model().state_dict()
    for name, tensor in base.items():
        assert torch.equal(tensor, kept.get(name, kept.get(f"base_model.{name}")))
    note = json.loads((run.directory / "prompt.json").read_text(encoding="utf-8"))
    assert note == json.loads((run.directory / "model" / "prompt.json").read_text(encoding="utf-8"))
    assert (run.directory / "prompt.txt").read_text(encoding="utf-8").strip()
    assert run.summary["head_parameters"] == 0
    assert run.summary["trainable_parameters"] == (6 if strategy == "black_box" else 0)


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [("selection", "llama"), ("selection", "bart"), ("in_context", "llama"), ("black_box", "gpt2")],
)
def test_generation(recipe: Any, tmp_path: Path, strategy: str, kind: str) -> None:
    run = fedcustom.run(recipe(strategy, kind, "generation"), out=tmp_path / "run")
    assert set(run.summary["metrics"]) == {"loss", *TEXT_METRICS}
    (said,) = run.predict([{"source": "kind food thing soup"}])
    assert isinstance(said["text"], str)


# --- selection ---


def test_selection_counts_what_is_right(recipe: Any, tmp_path: Path) -> None:
    """The tallies of a run against each candidate's answers on each client's examples, one by one."""
    run = fedcustom.run(
        recipe("selection", "llama", **{"method.breed": 0, "method.edits": 0, "rounds.count": 1}),
        out=tmp_path / "run",
    )
    method, data = built(run.recipe)
    for number, template in enumerate(DECODER):
        right, score, count = 0, 0.0, 0
        for name, client in data.clients.items():
            order = example_order(len(client.train), 0, 6, [0, 23, name_seed(name)])
            for example in (client.train[i] for i in order):
                logits = [
                    label_log_probability(
                        method.base, template.replace("{input}", example.text), f" {label}", None
                    )
                    - label_log_probability(
                        method.base, template.replace("{input}", "N/A"), f" {label}", None
                    )
                    for label in data.task.labels
                ]
                right += int(np.argmax(logits)) == example.label
                score += logits[example.label] - np.log(np.exp(logits).sum())
                count += 1
        found = last_state(run).values["tallies"][str(number)]
        assert found[0] == count == 18
        assert found[1] == right
        assert found[2] == pytest.approx(score, abs=1e-2)


def test_an_encoder_takes_the_nearest_description(recipe: Any, tmp_path: Path) -> None:
    run = fedcustom.run(recipe("selection", "bert", **{"rounds.count": 1}), out=tmp_path / "run")
    method, data = built(run.recipe)
    state = last_state(run)
    candidate = method.candidate(state, method.best(state))

    def vector(text: str) -> Any:
        ids = torch.tensor([method.base.tokenizer(text)["input_ids"][:16]])
        with torch.no_grad():
            mean = method.base.model(input_ids=ids).last_hidden_state[0].mean(dim=0).numpy()
        return mean / np.linalg.norm(mean)

    found = method.predict(state, data.test, texts=False).scores
    described = [vector(candidate.template.replace("{label}", label)) for label in candidate.labels]
    for example, row in zip(data.test[:5], found, strict=False):
        wanted = [vector(example.text) @ other / 0.05 for other in described]
        np.testing.assert_allclose(row, wanted, atol=1e-3)


def test_examples_are_fresh_until_all_were_used(recipe: Any) -> None:
    method, data = built(recipe("selection", "bert"))
    name, client = next(iter(data.clients.items()))
    seen = [
        i
        for number in range(1, len(client.train) // 6 + 1)
        for i in method._examples(ScoreTask(round_number=number, candidates=[]), Client(name, client))
    ]
    assert len(set(seen)) == len(seen)


def test_only_numbers_travel(recipe: Any) -> None:
    """No private text is in what a client sends, and no text goes down for candidates of the recipe."""
    method, data = built(recipe("selection", "llama"))
    state = method.initialise()
    (name, client), *_ = data.clients.items()
    task = method.configure(state, 1, {name: Work(epochs=1)})[name]
    assert task.bred == {}
    update = method.execute(task, Client(name, client))
    assert set(values_of(update)) == {"tallies", "examples", "weight"}
    assert not update.tensors
    assert all(isinstance(value, int | float) for row in update.tallies.values() for value in row)


def test_a_bandit_reaches_the_best_candidate(recipe: Any, tmp_path: Path) -> None:
    """With enough examples the choice is the candidate that is best on all private examples."""
    many = {"method.examples": 1000, "method.breed": 0, "method.edits": 6}
    for rule in ("successive_halving", "ucb", "thompson"):
        run = fedcustom.run(
            recipe("selection", "bert", **many, **{"method.bandit": rule}), out=tmp_path / rule
        )
        method, data = built(run.recipe)
        train = [example for client in data.clients.values() for example in client.train]
        labels = np.array([example.label for example in train])
        shares = []
        for candidate in method.pool:
            chosen = method.scorer.predict(candidate, train, texts=False).scores.argmax(axis=1)
            shares.append((chosen == labels).mean())
        state = last_state(run)
        assert shares[method.best(state)] == max(shares)


def test_breeding_adds_candidates(recipe: Any, tmp_path: Path) -> None:
    run = fedcustom.run(recipe("selection", "bert"), out=tmp_path / "run")
    state = last_state(run)
    method, data = built(run.recipe)
    known = {(c.template, c.labels) for c in method.pool}
    assert len(state.values["bred"]) == 4  # two after each round but the last
    for number, row in state.values["bred"].items():
        assert (row["template"], tuple(row["labels"])) not in known
        assert row["template"].count("{label}") == 1
        assert int(number) >= len(method.pool)
    task = method.configure(state, 4, {"client-0": Work()})["client-0"]
    assert set(task.bred) == {str(i) for i in task.candidates if i >= len(method.pool)}
    update = method.execute(task, Client("client-0", data.clients["client-0"]))
    method.check(task, update)


def test_bad_selection_answers(recipe: Any) -> None:
    method, data = built(recipe("selection", "bert", **{"method.edits": 0}))
    name, client = next(iter(data.clients.items()))
    task = method.configure(method.initialise(), 1, {name: Work()})[name]
    good = method.execute(task, Client(name, client))
    method.check(task, good)

    def refused(said: str, change: Any) -> None:
        tallies = {key: list(row) for key, row in good.tallies.items()}
        values = {"tallies": tallies, "examples": 6}
        update = change(tallies, values) or ScoreUpdate({}, 6.0, **values)
        with pytest.raises(UpdateError, match=said):
            method.check(task, update)

    refused("exactly the candidates", lambda t, v: t.pop("0") and None)
    refused("exactly the candidates", lambda t, v: t.update({"9": [6, 1, -1.0]}))
    refused("exactly the candidates", lambda t, v: ScoreUpdate({"x": torch.zeros(1)}, 6.0, **v))
    refused("exactly the candidates", lambda t, v: v.update(tallies=[1, 2]))
    refused("not a count", lambda t, v: t.update({"0": [6, float("nan"), -1.0]}))
    refused("not a count", lambda t, v: t.update({"0": [6, "many", -1.0]}))
    refused("not a count", lambda t, v: t.update({"0": [6, True, -1.0]}))
    refused("7 examples", lambda t, v: t.update({"0": [7, 1, -1.0]}))
    refused("6.0 examples", lambda t, v: t.update({"0": [6.0, 1, -1.0]}))
    refused("reward 7", lambda t, v: t.update({"0": [6, 7, -1.0]}))
    refused(r"reward 1\.5", lambda t, v: t.update({"0": [6, 1.5, -1.0]}))
    refused("above 0", lambda t, v: t.update({"0": [6, 1, 0.5]}))
    refused("below -1e", lambda t, v: t.update({"0": [6, 1, -1e30]}))
    refused("different numbers", lambda t, v: t.update({"0": [5, 1, -1.0]}))
    refused("different numbers", lambda t, v: v.update(examples=5))


# --- in-context ---


def test_refining_answers_by_hand(recipe: Any, tmp_path: Path) -> None:
    """Two rounds against prompts that are put together here."""
    run = fedcustom.run(recipe("in_context", **{"rounds.count": 2}), out=tmp_path / "run")
    method, data = built(run.recipe)
    assert isinstance(method, InContext)
    base, labels, queries = method.base, data.task.labels, [example.text for example in data.public]

    def vectors(texts: list[str]) -> Any:
        rows = []
        for text in texts:
            ids = torch.tensor([method.retriever.base.tokenizer(text)["input_ids"][:16]])
            with torch.no_grad():
                mean = (
                    method.retriever.base.model(input_ids=ids)
                    .last_hidden_state[0]
                    .mean(dim=0)
                    .double()
                    .numpy()
                )
            rows.append(mean / np.linalg.norm(mean))
        return np.stack(rows)

    free = np.array([label_log_probability(base, "N/A :", f" {label}", None) for label in labels])
    answers: Any = None
    for number in (1, 2):
        weights, said = [], []
        for client in data.clients.values():
            similar = vectors(queries) @ vectors([e.text for e in client.train]).T
            between = vectors(queries) @ vectors(queries).T
            rows, near = [], []
            for q, query in enumerate(queries):
                chosen = sorted(range(len(client.train)), key=lambda i: (-similar[q, i], i))[:2][::-1]
                near.append(similar[q, chosen].mean())
                shown = [f"{client.train[i].text} : {labels[client.train[i].label]}" for i in chosen]
                if number == 2:
                    other = max((i for i in range(len(queries)) if i != q), key=lambda i: between[q, i])
                    shown = [f"{queries[other]} : {labels[answers[other].argmax()]}", *shown]
                prompt = "\n\n".join([*shown, f"{query} :"])
                while len(base.tokenizer(prompt)["input_ids"]) > 64 - method._answer_room():
                    shown = shown[1:]
                    prompt = "\n\n".join([*shown, f"{query} :"])
                logits = (
                    np.array([label_log_probability(base, prompt, f" {label}", None) for label in labels])
                    - free
                )
                row = logits - np.log(np.exp(logits).sum())
                if number == 2:
                    row = 0.5 * row + 0.5 * answers[q]
                    row = row - np.log(np.exp(row).sum())
                rows.append(row)
            said.append(np.array(rows))
            weights.append(np.exp(np.array(near) / 0.1))
        shares = np.array(weights) / np.sum(weights, axis=0)
        pooled = np.einsum("kq,kql->ql", shares, np.array(said))
        answers = pooled - np.log(np.exp(pooled).sum(axis=1, keepdims=True))
    found = Checkpoints(run.directory / "checkpoints").load(2).state.tensors["answers"].numpy()
    np.testing.assert_allclose(found, answers, atol=0.02)  # float16 on the way, twice


def test_demonstrations_that_help_are_used(recipe: Any) -> None:
    """Before the first round the prompt is zero-shot; afterwards it holds the nearest answered queries."""
    method, data = built(recipe("in_context"))
    state = method.initialise()
    example = data.test[:1]
    assert method._prompts(method._shared(state, example, count=2), example) == [f"{example[0].text} :"]
    odds = torch.log_softmax(torch.eye(3)[[q % 3 for q in range(9)]] * 4, dim=1)
    answered = State({"answers": odds}, {}, state.values)
    (prompt,) = method._prompts(method._shared(answered, example, count=2), example)
    shown = prompt.split("\n\n")
    assert shown[-1] == f"{example[0].text} :"
    queries = [query.text for query in data.public]
    for block in shown[:-1]:
        text, _, answer = block.rpartition(" : ")
        assert data.task.labels[queries.index(text) % 3] == answer


def test_private_examples_stay(recipe: Any) -> None:
    method, data = built(recipe("in_context"))
    name, client = next(iter(data.clients.items()))
    update = method.execute(
        method.configure(method.initialise(), 1, {name: Work()})[name], Client(name, client)
    )
    assert set(update.tensors) == {"answers", "similarities"}
    assert {name: tensor.dtype for name, tensor in update.tensors.items()} == dict.fromkeys(
        ["answers", "similarities"], torch.float16
    )
    assert values_of(update) == {"examples": len(client.train), "weight": len(client.train)}


def test_the_surest_demonstrations_are_in_the_prompt_file(recipe: Any, tmp_path: Path) -> None:
    run = fedcustom.run(recipe("in_context"), out=tmp_path / "run")
    content = json.loads((run.directory / "prompt.json").read_text(encoding="utf-8"))
    assert len(content["demonstrations"]) == 9
    message = content["messages"][0]["content"]
    assert message.endswith("{input} :")
    shown = [block.rpartition(" : ") for block in message.split("\n\n")[:-1]]
    assert len(shown) == 2
    rows = {row["input"]: row for row in content["demonstrations"]}
    for text, _, answer in shown:
        assert rows[text]["answer"] == answer
    assert max(row["probability"] for row in rows.values()) in {
        rows[text]["probability"] for text, _, _ in shown
    }


def test_bad_in_context_answers(recipe: Any) -> None:
    method, data = built(recipe("in_context"))
    name, client = next(iter(data.clients.items()))
    task = method.configure(method.initialise(), 1, {name: Work()})[name]
    good = method.execute(task, Client(name, client)).tensors
    method.check(task, AnswerQueriesUpdate(good, examples=1))
    uniform = torch.full((9, 3), float(np.log(1 / 3))).half()
    for change, said in [
        ({"answers": uniform[:8]}, r"answers has shape \(8, 3\)"),
        ({"answers": uniform.float()}, "dtype"),
        ({"answers": torch.full_like(uniform, float("nan"))}, "outside"),
        ({"answers": torch.full_like(uniform, 0.5)}, "outside"),
        ({"answers": uniform - 1}, "do not sum to 1"),
        ({"similarities": torch.full((9,), 2.0).half()}, "similarities holds values outside"),
        ({"more": uniform}, "wrong tensor names"),
    ]:
        with pytest.raises(UpdateError, match=said):
            method.check(task, AnswerQueriesUpdate(good | change, examples=1))
    method, data = built(recipe("in_context", "llama", "generation"))
    task = method.configure(method.initialise(), 1, {name: Work()})[name]
    good = {"similarities": torch.zeros(9).half()}
    for texts, said in [
        (["a"] * 8, "9 texts"),
        ([1] * 9, "a text of"),
        (["a" * 20_001] * 9, "at most"),
        (None, "9 texts"),
    ]:
        with pytest.raises(UpdateError, match=said):
            method.check(task, AnswerQueriesUpdate(good, examples=1, answers=texts))


# --- black box ---


def test_no_gradients_anywhere(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a gradient was asked for")

    monkeypatch.setattr(torch.Tensor, "backward", never)
    monkeypatch.setattr(torch.autograd, "grad", never)
    monkeypatch.setattr(torch.autograd, "backward", never)
    for strategy in STRATEGIES:
        fedcustom.run(recipe(strategy), out=tmp_path / strategy)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_soft_prompt_lowers_the_loss(recipe: Any, tmp_path: Path, kind: str) -> None:
    longer = {"method.local_generations": 4, "method.examples": 30, "rounds.count": 3}
    run = fedcustom.run(recipe("black_box", kind, **longer), out=tmp_path / "run")
    method, data = built(run.recipe)
    assert isinstance(method, BlackBox)
    train = [example for client in data.clients.values() for example in client.train]
    before, after = np.zeros(6), last_state(run).tensors["mean"].double().numpy()
    assert method.loss(after, train) < method.loss(before, train)


def test_the_loss_of_a_point_by_hand(recipe: Any) -> None:
    method, data = built(recipe("black_box", "llama"))
    point = np.linspace(-1, 1, 6)
    words = method.base.model.get_input_embeddings().weight.detach()
    prefix = (method.map.double() @ torch.from_numpy(point)).float().view(3, 32) + method.first
    assert all(any(torch.equal(row, word) for word in words) for row in method.first)
    assert float(method.map.std()) == pytest.approx(float(words.std()) / np.sqrt(6), rel=0.1)
    total = 0.0
    for example in data.test[:4]:
        logits = np.array([
            label_log_probability(method.base, f"{example.text} :", f" {label}", prefix)
            - label_log_probability(method.base, "N/A :", f" {label}", prefix)
            for label in data.task.labels
        ])  # fmt: skip
        total -= logits[example.label] - np.log(np.exp(logits).sum())
    assert method.loss(point, data.test[:4]) == pytest.approx(total / 4, abs=1e-3)


def test_the_adapter_loads_with_peft(recipe: Any, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = fedcustom.run(recipe("black_box", "llama"), out=tmp_path / "run")
    base = AutoModelForCausalLM.from_pretrained(run.recipe.model.base)
    model = PeftModel.from_pretrained(base, run.directory / "model").eval()
    method, _ = built(run.recipe)
    prefix = method.soft_prompt(last_state(run).tensors["mean"].double().numpy())
    torch.testing.assert_close(model.get_prompt(1)[0], prefix)
    ids = torch.tensor([method.base.tokenizer("the old cat :")["input_ids"]])
    with torch.no_grad():
        odds = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].log_softmax(-1)
    (token, *_) = method.base.tokenizer(" a", add_special_tokens=False)["input_ids"]
    assert float(odds[token]) == pytest.approx(
        label_log_probability(method.base, "the old cat :", " a", prefix), abs=1e-3
    )


@pytest.mark.parametrize("weights", ["rank", "examples"])
def test_the_server_takes_the_weighted_mean(recipe: Any, weights: str) -> None:
    method, data = built(recipe("black_box", "bert", **{"method.client_weights": weights}))
    state = method.initialise()
    tasks = method.configure(state, 1, {name: Work() for name in data.clients})
    answers = []
    for name, task in tasks.items():
        update = method.execute(task, Client(name, data.clients[name]))
        method.check(task, update)
        answers.append(fedcustom.methods.Answer(name, task, update))
    merged = method.aggregate(state, answers).state
    if weights == "rank":
        places = np.argsort(np.argsort([typed(a.update, SearchUpdate).loss for a in answers]))
        raw = np.log(3.5) - np.log(places + 1)
    else:
        raw = np.array([len(data.clients[a.client].train) for a in answers], dtype=float)
    shares = raw / raw.sum()
    mean = sum(w * a.update.tensors["mean"].numpy() for w, a in zip(shares, answers, strict=True))
    np.testing.assert_allclose(merged.tensors["mean"].numpy(), mean, atol=1e-6)
    variance = sum(
        w * typed(a.update, SearchUpdate).sigma ** 2 * a.update.tensors["covariance"].numpy()
        for w, a in zip(shares, answers, strict=True)
    )
    np.testing.assert_allclose(
        merged.values["sigma"] ** 2 * merged.tensors["covariance"].numpy(), variance, rtol=1e-4
    )


def test_bad_distributions(recipe: Any) -> None:
    for covariance in ("diagonal", "full"):
        method, data = built(recipe("black_box", "bert", **{"method.covariance": covariance}))
        name, client = next(iter(data.clients.items()))
        task = method.configure(method.initialise(), 1, {name: Work()})[name]
        good = method.execute(task, Client(name, client))
        method.check(task, good)
        spread = good.tensors["covariance"]
        skew = spread.clone()
        skew.view(-1)[1] += 1
        bad: list[tuple[dict[str, Any], dict[str, Any], str]] = [
            ({"mean": torch.zeros(5)}, {}, "mean is"),
            ({"mean": torch.full((6,), float("inf"))}, {}, "not finite"),
            ({"covariance": -spread}, {}, "not positive definite"),
            ({"other": torch.zeros(1)}, {}, "wrong tensor names"),
            ({}, {"sigma": 0.0}, "sigma"),
            ({}, {"sigma": float("nan")}, "sigma"),
            ({}, {"loss": None}, "loss"),
            ({}, {"loss": -1e29}, "loss"),
            ({}, {"sigma": 1e5}, "at most"),
            ({"mean": torch.full((6,), 1e5)}, {}, "the mean moved"),
            ({}, {"examples": 3}, "one positive integer"),
        ]
        if covariance == "full":
            bad.append(({"covariance": skew}, {}, "not symmetric"))
        for tensors, values, said in bad:
            with pytest.raises(UpdateError, match=said):
                method.check(task, replace(good, tensors=good.tensors | tensors, **values))


# --- baselines, resuming, export ---


@pytest.mark.parametrize("strategy", list(STRATEGIES))
@pytest.mark.parametrize("baseline", ["local", "centralised"])
def test_baselines(recipe: Any, tmp_path: Path, strategy: str, baseline: str) -> None:
    run = fedcustom.run(recipe(strategy, baseline=baseline), out=tmp_path / "run")
    assert run.summary["bytes"]["up_total"] == 0
    if baseline == "centralised":
        assert run.predict(["the cat"])
        return
    with pytest.raises(RunError, match="one model for each client"):
        run.predict(["the cat"])
    # A client's own result is that of a run with this client alone.
    method, data = built(run.recipe)
    inner = method.method
    name = "client-1"
    state, client = inner.initialise(), Client(name, data.clients[name])
    for number in (1, 2, 3):
        task = inner.configure(state, number, {name: Work()})[name]
        state = inner.aggregate(
            state, [fedcustom.methods.Answer(name, task, inner.execute(task, client))]
        ).state
    checkpoint = Checkpoints(run.directory / "checkpoints").load(run.summary["best_round"])
    kept = json.loads(json.dumps(checkpoint.memories[name]["own"]))
    assert kept == json.loads(json.dumps(state.values))


def test_centralised_selection_scores_as_many_examples(recipe: Any, tmp_path: Path) -> None:
    rounds = {"rounds.count": 1, "method.breed": 0}
    central = fedcustom.run(recipe("selection", "bert", baseline="centralised", **rounds), out=tmp_path / "c")
    federated = fedcustom.run(recipe("selection", "bert", **rounds), out=tmp_path / "f")
    counts = [
        {i: row[0] for i, row in last_state(run).values["tallies"].items()} for run in (central, federated)
    ]
    assert counts[0] == counts[1]
    assert set(counts[0].values()) == {18}


@pytest.mark.parametrize("strategy", list(STRATEGIES))
@pytest.mark.parametrize("baseline", ["federated", "local"])
def test_stopped_runs_go_on(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, baseline: str
) -> None:
    chosen = recipe(strategy, baseline=baseline)
    whole = fedcustom.run(chosen, out=tmp_path / "whole")
    owner = {"selection": Selection, "in_context": InContext, "black_box": BlackBox}[strategy]
    original, left = owner.execute, [5]

    def dying(method: Any, task: Task, client: Client) -> Update:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return original(method, task, client)

    monkeypatch.setattr(owner, "execute", dying)
    with pytest.raises(KeyboardInterrupt):
        fedcustom.run(chosen, out=tmp_path / "stopped")
    monkeypatch.setattr(owner, "execute", original)
    stopped = fedcustom.run(chosen, out=tmp_path / "stopped", resume=True)
    assert list(map(without_seconds, rows_of(stopped.directory))) == list(
        map(without_seconds, rows_of(whole.directory))
    )
    assert stopped.summary["metrics"] == whole.summary["metrics"]
    if baseline == "federated":
        ours, theirs = ((run.directory / "prompt.json").read_bytes() for run in (stopped, whole))
        assert ours == theirs


@pytest.mark.parametrize(
    ("strategy", "kind", "task"),
    [
        ("selection", "llama", "classification"),
        ("selection", "bert", "classification"),
        ("in_context", "bart", "classification"),
        ("selection", "llama", "generation"),
        ("black_box", "bert", "classification"),
        ("black_box", "llama", "classification"),
    ],
)
def test_the_page_beside_the_prompt_runs(
    recipe: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    strategy: str,
    kind: str,
    task: str,
) -> None:
    """The code of README.md runs without this package, and gives its answer."""
    run = fedcustom.run(recipe(strategy, kind, task), out=tmp_path / "run")
    page = (run.directory / "model" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert "fedcustom" not in code
    (tmp_path / "page.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(run.directory / "model")
    capsys.readouterr()
    runpy.run_path(str(tmp_path / "page.py"))
    printed = capsys.readouterr().out.strip()
    if strategy == "selection" and task == "classification":
        assert printed == run.predict(["a text"])[0]["label"]


# --- what is refused ---

REFUSED: list[tuple[str, str, dict[str, Any], type[FedcustomError], str]] = [
    ("selection", "llama", {"method.instructions": ["nothing"]}, RecipeError, r"has neither \{input\}"),
    ("selection", "llama", {"method.instructions": ["a {label}"]}, RecipeError, r"must hold \{input\} once"),
    ("selection", "bert", {"method.instructions": ["{input}"]}, RecipeError, r"must hold \{label\} once"),
    ("selection", "llama", {"method.verbalisers": {"fod": "x"}}, RecipeError, "did you mean 'food'"),
    ("selection", "llama", {"method.verbalisers": {"food": "x", "place": "x"}}, RecipeError, "written 'x'"),
    ("selection", "llama", {"method.verbalisers": {"food": []}}, RecipeError, "a text or a list of texts"),
    ("selection", "llama", {"method.instructions_file": "no.txt"}, RecipeError, "no.txt: No such file"),
    ("selection", "llama", {"method.instructions": ["{input}" + " word" * 60]}, RecipeError, "64 positions"),
    ("selection", "bert", {"method.instructions": ["{label}" + " word" * 60]}, RecipeError, "64 positions"),
    ("selection", "llama", {"method.prompt_length": 3}, RecipeError, "belongs to strategy = 'black_box'"),
    ("in_context", "llama", {"method.examples": 3}, RecipeError, "set demonstrations"),
    ("in_context", "llama", {"public.source": None}, RecipeError, "set public.source or public.fraction"),
    ("in_context", "llama", {"method.preamble": "word " * 60}, RecipeError, "method.preamble.*64 positions"),
    ("in_context", "bert", {"method.instructions": ["{input}"]}, ModelError, "is an encoder"),
    ("in_context", "llama", {"method.verbalisers": {"food": ["x", "y"]}}, RecipeError, "alternatives need"),
    ("in_context", "llama", {"method.retriever": "builtin:nothing"}, ModelError, "no built-in model"),
    ("black_box", "bart", {}, ModelError, "is an encoder-decoder"),
    ("black_box", "llama", {"method.prompt_length": 60}, ModelError, "64"),
    ("selection", "llama", {"training.learning_rate": 0.1}, RecipeError, "0.1: has no meaning"),
    ("selection", "llama", {"aggregation.rule": "median"}, RecipeError, "aggregation.rule.*no meaning"),
    ("selection", "llama", {"attack.kind": "sign_flip"}, RecipeError, "attack.kind.*no meaning"),
    ("selection", "llama", {"compression.kind": "int8"}, RecipeError, "compression.kind.*no meaning"),
    ("selection", "llama", {"personalisation.keep": ["head"]}, RecipeError, "keep.*no meaning"),
    ("selection", "llama", {"participation.buffer": 2}, RecipeError, "participation.buffer.*no meaning"),
]  # fmt: skip


@pytest.mark.parametrize(("strategy", "kind", "changes", "error", "said"), REFUSED)
def test_refused(
    recipe: Any,
    tmp_path: Path,
    strategy: str,
    kind: str,
    changes: dict[str, Any],
    error: type[FedcustomError],
    said: str,
) -> None:
    with pytest.raises(error, match=said) as found:
        fedcustom.run(recipe(strategy, kind, **changes), out=tmp_path / "run")
    assert "\n" not in str(found.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_empty_pool(recipe: Any, tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.write_text("\n\n")
    changes = {"method.instructions": [], "method.instructions_file": str(path)}
    with pytest.raises(RecipeError, match=r"empty\.txt: holds no template"):
        fedcustom.run(recipe("selection", **changes), out=tmp_path / "run")


def test_a_prompt_outlives_the_file_of_templates(recipe: Any, tmp_path: Path) -> None:
    path = tmp_path / "templates.txt"
    path.write_text("about {label}\n{label} it is\n", encoding="utf-8")
    changes = {"method.instructions": [], "method.instructions_file": str(path)}
    run = fedcustom.run(recipe("selection", "bert", **changes), out=tmp_path / "run")
    path.unlink()
    assert fedcustom.load(run.directory).predict(["the old cat"])


def test_clients_that_drop_out_are_done_without(recipe: Any, tmp_path: Path) -> None:
    run = fedcustom.run(
        recipe("selection", "bert", **{"participation.dropout": 0.5, "method.breed": 0}), out=tmp_path / "run"
    )
    assert any(row.get("left_out") for row in rows_of(run.directory))


def test_comparing_with_a_method_that_trains(small: dict[str, Any]) -> None:
    """What the recipe says of training is left out, since it has no meaning here."""
    chosen = load_recipe(small).for_method("prompt_engineering")
    assert chosen.training == type(chosen.training)()
    assert chosen.method.name in registry.names()


def test_commands(recipe: Any, tmp_path: Path, command: Any) -> None:
    path, out = tmp_path / "recipe.toml", tmp_path / "run"
    path.write_text(to_toml(recipe("selection", "bert")), encoding="utf-8")
    done = command("run", path, "--out", out)
    assert done.code == 0, done.error
    assert "prompt_engineering" in done.out
    assert (out / "report.html").exists()
    assert command("predict", out, "the old cat").out.split()[0] in ("animal", "food", "place")
    assert command("export", out, "--to", tmp_path / "model").code == 0
    assert (tmp_path / "model" / "prompt.json").exists()
    listed = command("recipe", "--help-all").out
    assert "method.verbalisers" in listed
