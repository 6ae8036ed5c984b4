"""Distillation between language models with different tokenizers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedcustom
from fedcustom.core.errors import ModelError, RecipeError
from fedcustom.core.tensors import equal, part
from fedcustom.methods import Answer, Work
from fedcustom.methods.distillation import packing
from fedcustom.methods.distillation.method import Distillation
from fedcustom.methods.distillation.packing import unpack_positions
from fedcustom.methods.distillation.sampling import ASKED
from fedcustom.methods.distillation.token_translation import Translator, observed_losses
from fedcustom.methods.distillation.tokens import TokenExchange
from helpers.distillation import prepared
from helpers.rows import make_rows, write_jsonl
from helpers.runs import rows_of, tensors_of
from helpers.tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def other_tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny GPT-2 whose tokenizer knows fewer merges, so that it cuts words otherwise, and numbers tokens
    otherwise.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=310,
        special_tokens=["</s>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([row["target"] for row in make_rows(200, 3)], trainer)
    folder = tmp_path_factory.mktemp("models") / "gpt2-310"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="</s>", bos_token="<s>", eos_token="</s>", model_max_length=64
    ).save_pretrained(folder)
    torch.manual_seed(5)
    model = tiny_model("gpt2")
    model.resize_token_embeddings(312)  # a model may have more outputs than its tokenizer has tokens
    model.config.eos_token_id = model.config.pad_token_id = 0
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def speaking(tiny: dict[str, str], other_tokens: str, data_folder: Path, tmp_path: Path) -> dict[str, Any]:
    texts = [{"body": f"{row['source']} : {row['target']}"} for row in make_rows(60, 7)]
    unseen = {row["source"] for seed, count in ((1, 24), (2, 40)) for row in make_rows(count, seed)}
    write_jsonl(tmp_path / "public.jsonl", [t for t in texts if t["body"] not in unseen])
    return {
        "model": {"base": tiny["llama"]},
        "data": {
            "source": str(data_folder), "task": "generation", "test": "test", "development": "development",
            "prompt": "{source} :", "target": " {target}", "references": "references",
            "max_length": 24, "max_target_length": 16,
        },
        "clients": {"partition": "iid", "count": 3},
        "public": {"source": str(tmp_path), "split": "public", "text": "{body}"},
        "method": {
            "name": "distillation", "client_models": [tiny["gpt2"], other_tokens], "top_k": 4,
            "direction": "both", "samples_per_round": 30, "server_learning_rate": 3e-3, "server_epochs": 2,
        },
        "training": {"batch_size": 8, "learning_rate": 3e-3, "local_epochs": 2},
        "rounds": {"count": 3},
        "evaluation": {"max_new_tokens": 8, "select": "last"},
    }  # fmt: skip


def test_language_models_teach_each_other(speaking: dict[str, Any], tmp_path: Path) -> None:
    run = fedcustom.run(speaking, out=tmp_path / "run")
    assert run.summary["metrics"]["loss"] < run.summary["untuned"]["loss"] - 0.5
    rows = rows_of(run.directory)[1:]
    assert all(row["method"]["asked"] == 30 for row in rows)
    assert all(0 < row["method"]["taught"] <= 30 for row in rows)
    method, _ = prepared(speaking)
    assert isinstance(method.exchange, TokenExchange)
    speaker = method.exchange.speaker(method.models.of(1))
    drawn = np.sort(np.random.default_rng([0, 12, 1]).permutation(len(speaker.texts))[:30])
    places = sum(len(speaker.texts[i]) - 1 for i in drawn)
    sent = math.ceil(places * 4 * 8 / 8) + math.ceil(places * 4 * 9 / 8)  # 312 tokens need 9 bits
    assert sent < rows[0]["bytes_up"]["client-1"] < sent + 350
    assert set(run.summary["personalised"]["clients"]) == {"client-0", "client-1", "client-2"}
    assert run.model().config.model_type == "llama"


def test_a_killed_generation_run_goes_on(
    speaking: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fedcustom.run(speaking, out=tmp_path / "whole")
    original = Distillation.aggregate

    def killed(self: Distillation, state: Any, answers: Any) -> Any:
        if state.values.get("round") == 1:
            raise KeyboardInterrupt
        return original(self, state, answers)

    with monkeypatch.context() as patch:
        patch.setattr(Distillation, "aggregate", killed)
        with pytest.raises(KeyboardInterrupt):
            fedcustom.run(speaking, out=tmp_path / "killed")
    resumed = fedcustom.run(speaking, out=tmp_path / "killed", resume=True)
    assert equal(tensors_of(resumed.directory), tensors_of(whole.directory))
    assert resumed.summary["personalised"] == whole.summary["personalised"]


def test_the_best_teacher_of_each_text_is_taken(speaking: dict[str, Any]) -> None:
    """DualMinCE against each text's cross-entropies, computed from the clients' own dense predictions."""
    method, clients = prepared(speaking)
    exchange = method.exchange
    assert isinstance(exchange, TokenExchange)
    state = method.initialise()
    tasks = method.configure(state, 1, {name: Work(epochs=6) for name in clients})
    updates = {name: method.execute(tasks[name], client) for name, client in clients.items()}
    for name, update in updates.items():
        method.check(tasks[name], update)
    server = exchange.speaker(method.models.server)
    texts = unpack_positions(tasks["client-0"].tensors[ASKED], exchange.count)
    own = server.losses(state.tensors, texts)
    lessons: dict[int, list[tuple[float, float]]] = {int(t): [] for t in texts}
    for name, update in updates.items():
        speaker = exchange.speaker(method.models.of(method.models.number_of(name)))
        rows = packing.unpack(update.tensors, int(speaker.rows(texts)[-1]), speaker.format)
        translator = Translator(speaker, server)
        for text, start, stop in zip(
            texts.tolist(), speaker.rows(texts)[:-1], speaker.rows(texts)[1:], strict=True
        ):
            lesson = translator.lesson(text, rows[start:stop], own[text])
            lessons[text].append((lesson.loss, lesson.own_loss))
    expected = sum(min(losses)[0] < min(losses)[1] for losses in lessons.values())
    merged = method.aggregate(state, [Answer(n, tasks[n], update) for n, update in updates.items()])
    assert merged.report["taught"] == expected > 0
    # A model that knows nothing is no teacher: the server against itself has nothing to learn.
    loss = exchange._teach(server, state.tensors, {}, [0], "server", 1.0)
    assert loss == (state.tensors, None)


def test_lessons_of_equal_tokens_are_the_teachers_rows(speaking: dict[str, Any]) -> None:
    """Same tokenizer: the teacher's top-k probabilities and its loss, against the dense softmax."""
    method, _ = prepared(speaking)
    exchange = method.exchange
    assert isinstance(exchange, TokenExchange)
    teacher, student = (exchange.speaker(m) for m in (method.models.of(0), method.models.server))
    texts = np.array([0, 1])
    rows = teacher.top_k({}, texts)
    own = student.losses({}, texts)
    model, tokenizer = teacher.learner.base.model, teacher.learner.base.tokenizer
    ids = torch.tensor([tokenizer(method.context.public[1].text)["input_ids"]])
    with torch.no_grad():
        dense = torch.softmax(model(ids).logits[0, :-1].double(), 1)
    start = teacher.places(0)
    lesson = Translator(teacher, student).lesson(1, rows[start:], own[1])
    np.testing.assert_allclose(lesson.probabilities, dense.topk(4, dim=1).values, rtol=1e-4)
    assert lesson.valid.all()
    expected = []
    for place, token in enumerate(ids[0, 1:].tolist()):
        best = dense[place].topk(4)
        if token in best.indices.tolist():
            expected.append(-math.log(float(dense[place, token])))
        else:
            expected.append(-math.log((1 - float(best.values.sum())) / (400 - 4)))
    assert lesson.loss == pytest.approx(np.mean(expected), rel=1e-4)


def test_clients_learn_from_a_server_with_other_tokens(speaking: dict[str, Any], tmp_path: Path) -> None:
    """A server that knows the public texts, clients that know nothing: what comes down lowers the clients'
    losses on them, though one of them has other tokens.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(speaking["model"]["base"])
    tokenizer = AutoTokenizer.from_pretrained(speaking["model"]["base"])
    _, clients = prepared(speaking)
    public = [json.loads(line)["body"] for line in (tmp_path / "public.jsonl").open()]
    batch = tokenizer(public, padding=True, return_tensors="pt", return_token_type_ids=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "server")
    tokenizer.save_pretrained(tmp_path / "server")
    speaking["model"] = {"base": str(tmp_path / "server")}
    speaking["method"] |= {"client_epochs": 6, "samples_per_round": 20}
    method, clients = prepared(speaking)
    tasks = method.configure(method.initialise(), 1, {name: Work(steps=1) for name in clients})
    assert isinstance(method.exchange, TokenExchange)
    for name in ("client-0", "client-1"):
        learner = method.models.of(method.models.number_of(name))
        speaker = method.exchange.speaker(learner)
        texts = unpack_positions(tasks[name].tensors[ASKED], method.exchange.count)
        before = np.mean([loss.mean() for loss in speaker.losses({}, texts).values()])
        method.exchange.learn(learner, tasks[name], clients[name])
        after = speaker.losses(part(clients[name].memory.tensors, "state/"), texts)
        assert np.mean([loss.mean() for loss in after.values()]) < before - 0.5


def test_observed_losses() -> None:
    labels = np.array([[3, 1], [3, 1], [0, 0]])
    probabilities = np.array([[0.5, 0.25], [0.5, 0.25], [0.0, 0.0]])
    found = observed_losses(labels, probabilities, np.array([1, 7, 0]), 12)
    np.testing.assert_allclose(found, -np.log([0.25, 0.25 / 10, 1 / 10]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"method.top_k": None}, RecipeError, "method.top_k: unset; generation needs it"),
        ({"method.top_k": 400}, ModelError, "method.top_k = 400: .* has 400 tokens only"),
        ({"method.direction": "down"}, RecipeError, "method.direction = 'down': .* allowed: up, both"),
        (
            {"method.cache_duration": 1},
            RecipeError,
            "method.cache_duration = 1: is defined for classification",
        ),
        ({"method.ensemble": "logits"}, RecipeError, "method.ensemble = 'logits': is defined for classif"),
        ({"method.client_models": ["BERT"]}, ModelError, "is an encoder and cannot generate"),
        ({"method.client_models": ["BART"]}, ModelError, "only causal language models"),
    ],
)
def test_what_does_not_fit_language_models(
    speaking: dict[str, Any],
    tiny: dict[str, str],
    tmp_path: Path,
    change: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    key, value = next(iter(change.items()))
    if value in (["BERT"], ["BART"]):
        value = [tiny[value[0].lower()]]
    if value is None:
        del speaking["method"]["top_k"]
        change = {}
    else:
        change = {key: value}
    with pytest.raises(error, match=message) as caught:
        fedcustom.run(speaking, change, out=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_tiny_tokenizers_differ(other_tokens: str) -> None:
    from transformers import AutoTokenizer

    first, second = tiny_tokenizer(), AutoTokenizer.from_pretrained(other_tokens)
    text = "kind animal thing horse : the horse is a animal"
    assert first(text)["input_ids"] != second(text)["input_ids"]
    assert len(first(text)["input_ids"]) != len(second(text)["input_ids"])
