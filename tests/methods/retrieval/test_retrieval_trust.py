"""Retrieval: what nobody may learn, what nobody may claim, and what is never silently short."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedcustom
from fedcustom import library
from fedcustom.core.errors import DataError, FedcustomError, UpdateError
from fedcustom.data.build import build_data
from fedcustom.data.examples import ClientData, Example, LearningTask
from fedcustom.federated.build import make_method
from fedcustom.methods import Client, Task, Update
from fedcustom.methods.retrieval.checks import check_answer
from fedcustom.methods.retrieval.chunking import digest
from fedcustom.methods.retrieval.client import packed
from fedcustom.methods.retrieval.merging import by_score
from fedcustom.methods.retrieval.messages import RetrieveTask, RouteTask
from fedcustom.methods.retrieval.store import DocumentStore, Found
from fedcustom.models.embedding import embed
from fedcustom.models.load import load_base
from fedcustom.models.settings import ModelSettings
from fedcustom.recipe.recipe import load_recipe
from helpers.recipes import changed
from helpers.retrieval import rows, vectors_of
from helpers.tiny_models import tiny_tokenizer


def record(monkeypatch: Any) -> list[tuple[str, Task]]:
    """Every task that goes to a client of a library."""
    from fedcustom.methods.retrieval.client import RetrievalClient

    seen: list[tuple[str, Task]] = []
    plain = RetrievalClient.execute

    def work(self: Any, task: Task, client: Any) -> Any:
        seen.append((client.name, task))
        return plain(self, task, client)

    monkeypatch.setattr(RetrievalClient, "execute", work)
    return seen


def test_ties_many_stores(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    texts = [f"the old cat sees a house near the river and then {i} soup {i * 7}" for i in range(200)]

    def store(name: str, docs: list[str]) -> DocumentStore:
        made = DocumentStore(tmp_path / name, "e", tokenizer, (6, 0, 1))
        made.update(docs, vectors_of)
        return made

    query = vectors_of(["q"])
    pooled = store("all", texts).search(query, 10)[0].documents
    parts = {f"c{i}": store(f"c{i}", texts[i::4]).search(query, 10)[0] for i in range(4)}
    assert [h.document for h in by_score(parts, 10)] == pooled
    assert pooled == sorted(digest(t) for t in texts)[:10]


def test_vector_does_not_depend_on_batch() -> None:
    base = load_base(
        ModelSettings(base="builtin:minilm", device="cpu"), LearningTask("retrieval"), 0, head=False
    )
    texts = [f"the {w} of patient {i} " * (1 + i % 5) for i, w in enumerate(["fever", "cough", "pain"] * 12)]
    whole = embed(base, texts, max_length=32, batch_size=16)
    part = embed(base, texts[::3], max_length=32, batch_size=16)
    assert np.array_equal(whole[::3], part), float(np.abs(whole[::3] - part).max())


def test_private_query_stays_private(recipe: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    private = changed(recipe, privacy_epsilon=320.0)
    library.index(private, tmp_path / "i")
    opened = library.Library(tmp_path / "i")
    seen = record(monkeypatch)
    question = rows(1)[0]["question"]
    exact = opened.method.embedder.typed_questions([question])[0]
    opened.ask(question)
    for _, task in seen:
        for tensor in task.tensors.values():
            for row in tensor.reshape(-1, len(exact)):
                assert not np.allclose(row.numpy(), exact, atol=1e-6), task.kind


def test_noise_is_fresh(recipe: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    library.index(changed(recipe, privacy_epsilon=320.0), tmp_path / "i")
    seen = record(monkeypatch)
    for _ in range(2):
        library.ask(tmp_path / "i", rows(1)[0]["question"])
    sent = [t.tensors["queries"] for n, t in seen if t.kind == "retrieve" and n == "site-0"]
    assert len(sent) == 2
    assert not torch.equal(sent[0], sent[1])


def test_answers_need_the_question(recipe: dict[str, Any], tiny: dict[str, str]) -> None:
    with pytest.raises(FedcustomError, match="send_query_text"):
        load_recipe(changed(recipe, share="answer", generator=tiny["llama"]))


def test_index_keeps_its_router(recipe: dict[str, Any], tmp_path: Path) -> None:
    library.index(changed(recipe, routing="learned", route_recall=0.2), tmp_path / "i")
    assert library.Library(tmp_path / "i").method.searcher.ready.router is not None


def test_scores_have_a_range() -> None:
    query = torch.tensor([[1.0, 0, 0, 0]])
    task = RetrieveTask({"queries": query}, top=2, encoder="e")
    with pytest.raises(UpdateError):
        check_answer(task, Update(packed("vector", [Found([digest("a")], [1e30])], 2)), 4)


def test_lists_are_in_order() -> None:
    task = RetrieveTask({"queries": torch.tensor([[1.0, 0, 0, 0]])}, top=2, encoder="e")
    found = Found([digest("a"), digest("b")], [0.1, 0.9])
    with pytest.raises(UpdateError, match="begin with the best"):
        check_answer(task, Update(packed("vector", [found], 2)), 4)


def test_absent_library_is_said_first(recipe: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(FedcustomError, match=r"fedcustom\[retrieval\]"):
        fedcustom.run(recipe, out=tmp_path / "r")


def test_lone_surrogate(recipe: dict[str, Any], tmp_path: Path) -> None:
    bad = rows(45)
    bad[3]["answer"] = "a cat \ud800 near a house"
    lines = "".join(json.dumps(r) + "\n" for r in bad)
    (Path(recipe["data"]["source"]) / "train.jsonl").write_text(lines)
    with pytest.raises(FedcustomError):
        library.index(recipe, tmp_path / "i")


def test_documents_of_nobody(recipe: dict[str, Any], tmp_path: Path) -> None:
    lost = {**recipe, "clients": {"partition": "iid", "count": 3}, "evaluation": {"untuned": False}}
    with pytest.raises(FedcustomError, match="document"):
        fedcustom.run(lost, out=tmp_path / "r")


@pytest.mark.parametrize(
    "extra",
    [
        {"aggregation": {"rule": "median"}},
        {"compression": {"kind": "int8"}},
        {"attack": {"kind": "sign_flip", "fraction": 0.3}},
        {"participation": {"dropout": 0.5}},
    ],
    ids=lambda e: next(iter(e)),
)
def test_refused_without_training(recipe: dict[str, Any], extra: dict[str, Any]) -> None:
    with pytest.raises(FedcustomError):
        load_recipe({**recipe, **extra})


def test_index_leaves_a_run_whole(recipe: dict[str, Any], tmp_path: Path) -> None:
    trained = {**changed(recipe, train="full"), "training": {"local_steps": 2, "batch_size": 8}}
    run = fedcustom.run(trained, out=tmp_path / "r")
    before = (run.directory / "retrieval.json").read_text()
    with pytest.raises(FedcustomError, match="holds a run"):
        library.index(recipe, run.directory)
    assert (run.directory / "retrieval.json").read_text() == before
    assert library.ask(run.directory, rows(1)[0]["question"]).passages


def test_other_weights_same_folder(recipe: dict[str, Any], tiny: dict[str, str], tmp_path: Path) -> None:
    import shutil

    from helpers.tiny_models import tiny_model

    folder = tmp_path / "m"
    shutil.copytree(tiny["bert"], folder)
    same = {**recipe, "model": {"base": str(folder)}}
    library.index(same, tmp_path / "i")
    question = rows(1)[0]["question"]
    library.ask(tmp_path / "i", question)
    torch.manual_seed(99)
    tiny_model("bert").save_pretrained(folder)
    library.index(same, tmp_path / "i")
    again = library.ask(tmp_path / "i", question)
    fresh = tmp_path / "j"
    library.index(same, fresh)
    expected = library.ask(fresh, question)
    assert [(p.document, p.score) for p in again.passages] == [
        (p.document, p.score) for p in expected.passages
    ]


def test_damaged_store(recipe: dict[str, Any], tmp_path: Path) -> None:
    library.index(recipe, tmp_path / "i")
    for file in (tmp_path / "i" / "clients" / "site-1").rglob("*.lance"):
        if file.is_file():
            file.write_bytes(b"x")
    notes: list[str] = []
    reply = library.ask(tmp_path / "i", rows(1)[0]["question"], note=notes.append)
    assert len(notes) == 1
    assert "site-1 left out" in notes[0]
    assert {p.client for p in reply.passages} == {"site-0", "site-2"}


def test_bytes_include_passages(recipe: dict[str, Any], tmp_path: Path) -> None:
    library.index(recipe, tmp_path / "i")
    opened, question = library.Library(tmp_path / "i"), rows(1)[0]["question"]
    lists = opened.method.search(opened.state, [question]).bytes_up
    reply = opened.ask(question)
    assert reply.bytes_up >= lists + sum(len((p.text or "").encode()) for p in reply.passages)


@pytest.mark.parametrize("train", ["none", "full", "lora"])
def test_sentence_transformers(recipe: dict[str, Any], tmp_path: Path, train: str) -> None:
    from sentence_transformers import SentenceTransformer

    made = {**changed(recipe, train=train), "training": {"local_steps": 2, "batch_size": 8}}
    run = fedcustom.run({**made, "evaluation": {"untuned": False}}, out=tmp_path / "r")
    texts = [r["question"] for r in rows(4)]
    theirs = SentenceTransformer(str(run.directory / "model"), device="cpu").encode(texts)
    ours = library.Library(run.directory).method.embedder.typed_questions(texts)
    np.testing.assert_allclose(theirs, ours, atol=1e-5)


def test_one_client_that_does_not_answer_a_search_cannot_stop_the_run(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    """What it has counts as not found: the ranks of all other documents are those of a run without it."""
    from fedcustom.methods.retrieval.client import RetrievalClient

    plain = RetrievalClient.execute

    def work(self: Any, task: Task, client: Any) -> Update:
        if isinstance(task, RetrieveTask) and client.name == "site-1":
            raise UpdateError("no answer")
        return plain(self, task, client)

    def found(run: Any) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (run.directory / "predictions.jsonl").read_text().splitlines()]

    whole = found(fedcustom.run(recipe, out=tmp_path / "whole"))
    monkeypatch.setattr(RetrievalClient, "execute", work)
    run = fedcustom.run(recipe, out=tmp_path / "run")
    content = json.loads((run.directory / "retrieval.json").read_text())
    assert content["silent"] == ["site-1"]
    for before, now in zip(whole, found(run), strict=True):
        if before["rank"] is not None and now["rank"] is not None:
            assert now["rank"] <= before["rank"], "there are fewer documents before it"
    lost = [now["rank"] is None for now in found(run)]
    assert 0 < sum(lost) < len(lost)
    assert run.summary["metrics"]["recall_at_10"] <= 1 - sum(lost) / len(lost)


@pytest.mark.parametrize(("different", "copies"), [(1, 1), (8, 1), (9, 9), (3, 20)])
def test_sums_for_routing_are_not_single_questions(
    recipe: dict[str, Any], different: int, copies: int
) -> None:
    """A client with fewer than nine different questions, or with one that stands out, sends no sums."""
    checked = load_recipe(changed(recipe, routing="learned"))
    base = load_base(checked.model, LearningTask("retrieval"), 0, head=False)
    method = make_method(checked, base, build_data(checked.data, checked.clients, 0, checked.public))
    texts = [f"what is number {number}" for number in range(different)]
    questions = [Example(text, target="x") for text in [texts[0]] * (copies - 1) + texts]
    with pytest.raises(DataError, match=f"withholds the sums of its {len(questions)} questions"):
        method.execute(RouteTask(), Client("site-0", ClientData("site-0", questions)))
    enough = [Example(f"what is number {number}", target="x") for number in range(9)]
    sent = method.execute(RouteTask(), Client("site-0", ClientData("site-0", enough)))
    assert sent.questions == 9
