"""Knowledge distillation: rounds put together by hand, caches, baselines and bad input."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from typer.testing import CliRunner

import fedcustom
from fedcustom.cli.app import app
from fedcustom.core.errors import DataError, ModelError, RecipeError, RunError, UpdateError
from fedcustom.core.files import read_tensors
from fedcustom.core.tensors import equal, part
from fedcustom.data.build import build_data
from fedcustom.data.tokens import example_order
from fedcustom.federated.resolve import resolved
from fedcustom.federated.run_directory import Checkpoints
from fedcustom.methods import Answer, Client, Task, Update, Work
from fedcustom.methods.distillation import packing
from fedcustom.methods.distillation.labels import CACHE, CURRENT, FRESH, REFRESHED, SOFT, LabelExchange
from fedcustom.methods.distillation.messages import DistilUpdate
from fedcustom.methods.distillation.method import Distillation
from fedcustom.methods.distillation.packing import unpack_positions
from fedcustom.methods.distillation.sampling import ASKED
from fedcustom.methods.messages import typed
from fedcustom.models.load import load_base
from fedcustom.recipe.recipe import load_recipe, to_toml
from fedcustom.training.label_prior import label_offset
from helpers.distillation import prepared
from helpers.recipes import changed
from helpers.rows import make_rows, write_jsonl
from helpers.runs import rows_of, tensors_of, without_seconds

SITES = [f"site-{number}" for number in range(4)]


@pytest.fixture
def distil(tiny: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    """Four clients with two architectures in turn, forty public texts."""
    rows = [{**row, "text": f"{row['text']} {number}"} for number, row in enumerate(make_rows(200, 0))]
    folder = tmp_path / "texts"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", rows[:160])
    write_jsonl(folder / "test.jsonl", rows[160:])
    return {
        "model": {"base": tiny["bert"]},
        "data": {"source": str(folder), "test": "test", "max_length": 24},
        "clients": {"partition": "natural", "column": "site"},
        "public": {"fraction": 0.25},
        "method": {"name": "distillation", "client_models": [tiny["bert"], tiny["llama"]]},
        "training": {"batch_size": 8, "learning_rate": 3e-3},
        "rounds": {"count": 3},
        "evaluation": {"batch_size": 32},
    }


# --- rounds ---


def test_a_round_is_federated_distillation(distil: dict[str, Any], tmp_path: Path) -> None:
    """FedDF by hand: the clients' soft labels from models that plain loops trained, their mean, and a plain
    loop on that at the server.
    """
    recipe = changed(distil, server_epochs=2, server_learning_rate=1e-3)
    run = fedcustom.run({**recipe, "rounds": {"count": 1}}, out=tmp_path / "run")
    method, clients = prepared(recipe)
    public = [example.text for example in method.context.public]
    total = np.zeros((len(public), 3))
    for number, (name, client) in enumerate(clients.items()):
        model, tokenizer = fresh(recipe["method"]["client_models"][number % 2], method)
        texts = [example.text for example in client.data.train]
        order = example_order(len(texts), 0, len(texts), [0, 5, fedcustom.core.seeds.name_seed(name)])
        labels = functional.one_hot(torch.tensor([e.label for e in client.data.train]), 3).float()
        train_plainly(model, tokenizer, texts, labels, order, 8, 3e-3)
        soft = torch.softmax(logits_of(model, tokenizer, public), 1).double().numpy()
        rounded = packing.quantise(soft, 255) / 255
        total += rounded * len(texts) / sum(len(c.data.train) for c in clients.values())
    server, tokenizer = fresh(recipe["model"]["base"], method)
    order = example_order(len(public), 0, 2 * len(public), [0, 13, 1])
    train_plainly(server, tokenizer, public, torch.from_numpy(total).float(), order, 16, 1e-3)
    found = Checkpoints(run.directory / "checkpoints").load(1).state
    np.testing.assert_allclose(found.server[SOFT].numpy(), total, atol=2 / 255)
    for name, tensor in server.state_dict().items():
        if name in found.tensors:
            torch.testing.assert_close(found.tensors[name], tensor, rtol=1e-3, atol=2e-4)


def fresh(base: str, method: Distillation) -> tuple[Any, Any]:
    settings_ = method.context.model.model_copy(update={"base": base})
    loaded = load_base(settings_, method.context.base.task, 0)
    return loaded.model, loaded.tokenizer


def logits_of(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return torch.cat(
            [model(**tokenizer([t], return_tensors="pt", return_token_type_ids=False)).logits for t in texts]
        )


def train_plainly(
    model: Any,
    tokenizer: Any,
    texts: list[str],
    targets: torch.Tensor,
    order: list[int],
    size: int,
    rate: float,
) -> None:
    """AdamW on cross-entropy with soft targets (whose gradient is that of the KL divergence)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    model.eval()
    for epoch in range(0, len(order), len(texts)):
        one = order[epoch : epoch + len(texts)]
        for start in range(0, len(one), size):
            chosen = one[start : start + size]
            batch = tokenizer(
                [texts[i] for i in chosen], padding=True, return_tensors="pt", return_token_type_ids=False
            )
            functional.cross_entropy(model(**batch).logits, targets[chosen]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("direction", ["up", "down", "both"])
def test_runs_end_to_end(distil: dict[str, Any], tmp_path: Path, direction: str) -> None:
    run = fedcustom.run(changed(distil, direction=direction), out=tmp_path / "run")
    rows = rows_of(run.directory)
    per_client = run.summary["bytes"]["up_per_client_round"]
    sent = math.ceil(40 * 2 * 8 / 8)  # forty texts, three labels of which the last one's mass is what is left
    assert sent < per_client < sent + 250
    assert (run.directory / "model").exists() == (direction != "down")
    assert (run.directory / "report.html").exists() is False
    if direction == "down":
        assert "server_loss" not in rows[-1]["method"]
        assert "personalised" not in run.summary  # its metrics are the clients' own
        with pytest.raises(RunError, match="one model for each client"):
            run.model()
    else:
        assert set(run.summary["personalised"]["clients"]) == set(SITES)
        server = rows[-1]["method"]["server_loss"]
        assert server < 0.5
    down = [row["bytes_down"]["site-0"] for row in rows[1:]]
    assert (down[1] > down[0] + sent - 20) == (direction != "up")


def test_clients_that_only_speak_train_as_if_alone(distil: dict[str, Any], tmp_path: Path) -> None:
    run = fedcustom.run({**distil, "evaluation": {"select": "last"}}, out=tmp_path / "federated")
    alone = fedcustom.run(
        {**distil, "baseline": "local", "evaluation": {"select": "last"}}, out=tmp_path / "local"
    )
    ours, theirs = memories(run.directory, 3), memories(alone.directory, 3)
    for site in SITES:
        assert equal(ours[site], theirs[site])
    assert alone.summary["bytes"]["up_total"] == alone.summary["bytes"]["down_total"] == 0
    assert not (alone.directory / "model").exists()
    # The local figure is the mean over clients on the whole test set, each with its own architecture.
    method, clients = prepared({**distil, "baseline": "local"})
    data = build_data(alone.recipe.data, alone.recipe.clients, 0, alone.recipe.public)
    accuracies = []
    for site in SITES:
        clients[site].memory.tensors = theirs[site]
        scores = method.predict(method.initialise(), data.test, clients[site], texts=False).scores
        accuracies.append(np.mean(scores.argmax(1) == [example.label for example in data.test]))
    assert alone.summary["metrics"]["accuracy"] == pytest.approx(np.mean(accuracies))


def memories(directory: Path, number: int) -> dict[str, Any]:
    checkpoint = Checkpoints(directory / "checkpoints").load(number)
    folder = directory / "checkpoints" / "clients"
    return {name: read_tensors(folder / file) for name, file in checkpoint.files.items()}


@pytest.mark.slow
def test_distillation_learns(distil: dict[str, Any], data_folder: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", make_rows(480, 0))
    write_jsonl(
        tmp_path / "test.jsonl",
        [{**row, "text": f"{row['text']} {n}"} for n, row in enumerate(make_rows(40, 2))],
    )
    recipe = changed(distil, server_epochs=6, server_learning_rate=3e-3)
    recipe["data"] = {**recipe["data"], "source": str(tmp_path)}
    recipe |= {
        "clients": {"partition": "iid", "count": 2},
        "rounds": {"count": 6},
        "evaluation": {"every": 6},
    }
    run = fedcustom.run(recipe, {"training.local_epochs": 2}, out=tmp_path / "run")
    assert run.summary["metrics"]["accuracy"] > 0.8 > run.summary["untuned"]["accuracy"]


def test_the_exported_model_is_the_servers(distil: dict[str, Any], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    for method in ("full", "lora"):
        changes = {"server_method": method, "client_method": "lora", "lora_rank": 2}
        run = fedcustom.run(changed(distil, **changes), out=tmp_path / method)
        kept = memories(run.directory, run.summary["best_round"])["site-0"]
        assert all("lora" in name or "classifier" in name for name in part(kept, "state/"))
        texts = [json.loads(line) for line in (run.directory / "predictions.jsonl").open()]
        model = run.model()
        assert isinstance(model, PeftModel) == (method == "lora")
        if method == "full":
            model = AutoModelForSequenceClassification.from_pretrained(run.directory / "model")
        logits = logits_of(model, run.tokenizer(), [line["text"] for line in texts])
        for line, row in zip(texts, torch.softmax(logits, 1), strict=True):
            assert float(row.max()) == pytest.approx(line["probability"], abs=1e-4)
        assert run.predict([texts[0]["text"]])[0]["label"] == texts[0]["prediction"]


def test_compared_with_sharing_weights(distil: dict[str, Any], tmp_path: Path) -> None:
    """One command gives distillation, the clients alone and federated full fine-tuning of one recipe; the
    page says what each sent at equal quality.
    """
    recipe = tmp_path / "distil.toml"
    recipe.write_text(to_toml(load_recipe(distil)))
    command = ["compare", str(recipe), "--methods", "distillation,full", "--baselines", "local"]
    result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "runs"), "--quiet"])
    assert result.exit_code == 0, result.output
    folders = ("distillation", "full", "local-distillation")
    runs = {name: fedcustom.load(tmp_path / "runs" / name / "seed-0") for name in folders}
    assert runs["local-distillation"].summary["bytes"]["up_total"] == 0
    sent = {name: runs[name].summary["bytes"]["up_total"] for name in ("distillation", "full")}
    assert sent["distillation"] < 0.05 * sent["full"]
    page = (tmp_path / "runs" / "report.html").read_text()
    assert re.search(r"accuracy on the development split distillation sent .* in all; full fine-tuning", page)


# --- the cache ---


def test_cached_labels_do_not_travel_again(distil: dict[str, Any]) -> None:
    """The rounds' messages against a plain simulation of who knows what."""
    recipe = changed(distil, direction="both", cache_duration=2, samples_per_round=15)
    method, clients = prepared(recipe)
    exchange = method.exchange
    assert isinstance(exchange, LabelExchange)
    state, made, known = method.initialise(), {}, {site: {} for site in SITES}  # type: ignore[var-annotated]
    last: set[int] = set()
    for number in range(1, 7):
        cohort = SITES if number % 2 else SITES[:2]  # two clients are away in every other round
        tasks = method.configure(state, number, {site: Work(steps=1) for site in cohort})
        drawn = np.random.default_rng([0, 12, number]).permutation(40)[:15]
        expected = sorted(int(i) for i in drawn if i not in made or number - made[i] > 2)
        answers = []
        for site in cohort:
            assert unpack_positions(tasks[site].tensors[ASKED], 40).tolist() == expected
            if number > 1:
                lacking = sorted(i for i in last if known[site].get(i) != made[i])
                assert unpack_positions(tasks[site].tensors[FRESH], 40).tolist() == lacking
                known[site] |= {i: made[i] for i in lacking}
            update = method.execute(tasks[site], clients[site])
            method.check(tasks[site], update)
            answers.append(Answer(site, tasks[site], update))
            if number > 1:
                current = unpack_positions(tasks[site].tensors[CURRENT], 40)
                assert set(current.tolist()) == last
                cache = clients[site].memory.tensors[CACHE][current]
                assert float((cache - state.server[SOFT][current]).abs().max()) < 1 / 255 + 1e-6
        merged = method.aggregate(state, answers)
        state = merged.state
        made |= dict.fromkeys(expected, number)
        last = {int(i) for i in drawn}
        assert {int(i): int(state.server[REFRESHED][i]) for i in made} == made
        assert merged.report["asked"] == len(expected)
        assert merged.report["cached"] == 15 - len(expected)


def test_a_client_that_lost_its_cache_says_so(distil: dict[str, Any]) -> None:
    method, clients = prepared(changed(distil, direction="both", cache_duration=5))
    state = method.initialise()
    for number in (1, 2, 3):
        tasks = method.configure(state, number, {"site-1": Work(steps=1)})
        if number == 3:
            clients["site-1"].memory.tensors = {}
            with pytest.raises(DataError, match="'site-1' lacks soft labels that the server takes for known"):
                method.execute(tasks["site-1"], clients["site-1"])
            break
        update = method.execute(tasks["site-1"], clients["site-1"])
        state = method.aggregate(state, [Answer("site-1", tasks["site-1"], update)]).state


@pytest.mark.parametrize(
    "method",
    [
        {"direction": "up"},
        {"direction": "both", "cache_duration": 1, "samples_per_round": 12, "client_method": "lora"},
        {"direction": "down", "top_k": 1, "bits": 4},
    ],
)
def test_a_killed_run_goes_on_to_the_same_result(
    distil: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: dict[str, Any]
) -> None:
    recipe = changed(distil, **method)
    recipe["training"] = {**recipe["training"], "dropout": True}
    whole = fedcustom.run(recipe, out=tmp_path / "whole")
    original = Distillation.execute

    def killed(self: Distillation, task: Task, client: Client) -> Update:
        if task.round_number == 3 and client.name == "site-2":
            raise KeyboardInterrupt
        return original(self, task, client)

    with monkeypatch.context() as patch:
        patch.setattr(Distillation, "execute", killed)
        with pytest.raises(KeyboardInterrupt):
            fedcustom.run(recipe, out=tmp_path / "killed")
    resumed = fedcustom.run(recipe, out=tmp_path / "killed", resume=True)
    assert list(map(without_seconds, rows_of(resumed.directory))) == list(
        map(without_seconds, rows_of(whole.directory))
    )
    ours, theirs = (Checkpoints(run.directory / "checkpoints").load(3) for run in (resumed, whole))
    assert equal(ours.state.tensors, theirs.state.tensors)
    assert equal(ours.state.server, theirs.state.server)
    for site in SITES:
        assert equal(memories(resumed.directory, 3)[site], memories(whole.directory, 3)[site])
    assert resumed.summary["metrics"] == whole.summary["metrics"]
    if method["direction"] != "down":
        assert equal(tensors_of(resumed.directory), tensors_of(whole.directory))


def test_late_and_lost_answers(distil: dict[str, Any], tmp_path: Path) -> None:
    recipe = changed(distil, direction="both", samples_per_round=20, cache_duration=1)
    recipe |= {"participation": {"buffer": 2, "dropout": 0.3, "partial": 0.5}}
    recipe |= {"rounds": {"count": 5}, "aggregation": {"weighting": "uniform"}}
    run = fedcustom.run(recipe, out=tmp_path / "run")
    rows = rows_of(run.directory)[1:]
    assert any(row["late"] for row in rows)
    assert {reason for row in rows for reason in row["left_out"].values()} == {"dropped out"}


def test_a_late_answer_counts_less(distil: dict[str, Any]) -> None:
    """Weights are examples times the discount."""
    method, clients = prepared(distil)
    state = method.initialise()
    tasks = method.configure(state, 1, {site: Work(steps=1) for site in SITES[:2]})
    answers = [
        Answer(site, tasks[site], method.execute(tasks[site], clients[site]), discount)
        for site, discount in zip(SITES, (1.0, 0.25), strict=False)
    ]
    assert isinstance(method.exchange, LabelExchange)
    said = [method.exchange._read(a.task, a.update.tensors)[1] for a in answers]
    weights = [len(clients[site].data.train) * d for site, d in zip(SITES, (1.0, 0.25), strict=False)]
    expected = (weights[0] * said[0] + weights[1] * said[1]) / sum(weights)
    torch.testing.assert_close(method.aggregate(state, answers).state.server[SOFT], expected)


def test_label_prior() -> None:
    examples = [fedcustom.data.examples.Example("x", label=label) for label in (0, 0, 2)]
    torch.testing.assert_close(
        label_offset([e.label for e in examples], 3).exp(), torch.tensor([3, 1, 2]) / 6
    )


def test_logit_adjustment_changes_training_only(distil: dict[str, Any]) -> None:
    """The first step's loss is the cross-entropy of the logits plus the log of the label shares."""
    losses = {}
    for adjust in (False, True):
        method, clients = prepared(
            {**distil, "training": {**distil["training"], "logit_adjustment": float(adjust)}}
        )
        client = clients["site-0"]
        task = method.configure(method.initialise(), 1, {"site-0": Work(steps=1)})["site-0"]
        untrained = method.predict(method.initialise(), client.data.train, client, texts=False).scores
        losses[adjust] = typed(method.execute(task, client), DistilUpdate).loss
        offset = label_offset([e.label for e in client.data.train], 3).numpy() if adjust else 0.0
        seed = [0, 5, fedcustom.core.seeds.name_seed("site-0")]
        chosen = example_order(len(client.data.train), 0, 8, seed)
        logits = torch.from_numpy(untrained[chosen] + offset)
        labels = torch.tensor([client.data.train[i].label for i in chosen])
        assert losses[adjust] == pytest.approx(float(functional.cross_entropy(logits, labels)), rel=1e-4)
    assert losses[True] != losses[False]


# --- what clients send is not trusted ---


def test_unsound_answers_are_refused(distil: dict[str, Any]) -> None:
    method, clients = prepared(distil)
    task = method.configure(method.initialise(), 1, {"site-0": Work(epochs=1)})["site-0"]
    good = method.execute(task, clients["site-0"])
    method.check(task, good)
    assert set(good.tensors) == {"probabilities"}

    def refused(message: str, tensors: Any = None, weight: float = good.weight, **values: Any) -> None:
        tensors = good.tensors if tensors is None else tensors
        update = replace(typed(good, DistilUpdate), tensors=tensors, weight=weight, **values)
        with pytest.raises(UpdateError, match=message):
            method.check(task, update)

    full = good.tensors["probabilities"]
    refused("wrong tensor names", {})
    refused("wrong tensor names", {**good.tensors, "weights": torch.zeros(3)})
    refused("not torch.uint8 of", {"probabilities": full[:-1]})
    refused("not torch.uint8 of", {"probabilities": full.float()})
    refused("sum to", {"probabilities": torch.full_like(full, 255)})
    refused("weight", weight=-1.0)
    refused("loss", loss=math.nan)
    refused("steps", steps=10**9)
    refused("examples", examples=0)


def test_an_answer_to_nothing_is_refused(distil: dict[str, Any]) -> None:
    method, clients = prepared(changed(distil, cache_duration=9))
    state = method.initialise()
    for number in (1, 2):
        task = method.configure(state, number, {"site-0": Work(steps=1)})["site-0"]
        update = method.execute(task, clients["site-0"])
        state = method.aggregate(state, [Answer("site-0", task, update)]).state
    assert update.tensors == {}  # all was cached
    with pytest.raises(UpdateError, match="nothing was asked for"):
        method.check(task, replace(update, tensors={"probabilities": torch.zeros(1)}))


# --- recipes ---


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"public.fraction": 0.0}, RecipeError, "needs public texts; set public.source or public.fraction"),
        ({"public.fraction": 0.001}, DataError, "public set: holds no text"),
        ({"baseline": "centralised"}, RecipeError, "nobody to learn from; use method.name = 'full'"),
        ({"compression.kind": "int8"}, RecipeError, r"\[compression\]: not with .* method.bits"),
        ({"attack.kind": "sign_flip"}, RecipeError, r"\[attack\]: not with method.name = 'distillation'"),
        ({"personalisation.keep": ["head"]}, RecipeError, r"\[personalisation\]: not with"),
        ({"personalisation.finetune_epochs": 1}, RecipeError, r"\[personalisation\]: not with"),
        ({"aggregation.rule": "median"}, RecipeError, "aggregation.rule = 'median': .* not weights"),
        ({"aggregation.correction": "scaffold"}, RecipeError, "aggregation.correction = 'scaffold'"),
        ({"aggregation.server_optimizer": "fedadam"}, RecipeError, "aggregation.server_optimizer"),
        ({"training.gradient_checkpointing": True}, RecipeError, "distillation keeps all activations"),
        ({"training.proximal": 0.1}, RecipeError, "training.proximal: .* no global weights"),
        ({"method.client_models": []}, RecipeError, r"client_models = \[\]: name one at least"),
        (
            {"method.client_models": ["builtin:minilmm"]},
            ModelError,
            "method.client_models: no built-in model",
        ),
        ({"method.client_models": ["./nowhere"]}, ModelError, "method.client_models: no folder ./nowhere"),
        ({"data.max_length": 65, "model.base": "builtin:minilm"}, ModelError, "method.client_models has 64"),
        ({"method.bits": 7}, RecipeError, "method.bits = 7: must be 4, 8 or 16"),
        ({"method.ensemble": "sharp"}, RecipeError, "did you mean 'sharpened'"),
        ({"method.rank": 4}, RecipeError, "method.rank: unknown setting"),
    ],
)
def test_what_does_not_fit_is_refused(
    distil: dict[str, Any], tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        fedcustom.run(distil, change, out=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_clients_learning_rate_is_that_of_their_method(distil: dict[str, Any]) -> None:
    del distil["training"]["learning_rate"]
    assert resolved(load_recipe(distil)).training.learning_rate == 1e-4
    assert resolved(load_recipe(changed(distil, client_method="lora"))).training.learning_rate == 2e-3


def test_a_public_set_that_overlaps_the_test_set_is_refused(distil: dict[str, Any], tmp_path: Path) -> None:
    distil["public"] = {"source": distil["data"]["source"], "split": "test"}
    with pytest.raises(DataError, match="a public set must not overlap them"):
        fedcustom.run(distil, out=tmp_path / "run")
