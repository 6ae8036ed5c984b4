"""Retrieval from end to end: searches, policies, routing, training, the command line and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import fedcustom
from fedcustom import library
from fedcustom.cli.app import app
from fedcustom.core.errors import DataError, FedcustomError, ModelError, RecipeError, RunError, UpdateError
from fedcustom.data.examples import ClientData, LearningTask
from fedcustom.federated.callbacks import Callback
from fedcustom.methods import Client, State, Task, Update
from fedcustom.methods.retrieval.messages import FetchTask
from fedcustom.methods.retrieval.method import Retrieval
from fedcustom.methods.retrieval.negatives import BORROWED, LENT, Negatives
from fedcustom.methods.retrieval.settings import RetrievalSettings
from fedcustom.methods.tuning.messages import TrainTask
from fedcustom.models.embedding import embed
from fedcustom.models.load import load_base
from fedcustom.models.settings import ModelSettings
from fedcustom.recipe.recipe import load_recipe, to_toml
from fedcustom.transport import wire
from helpers.recipes import changed
from helpers.retrieval import rows
from helpers.rows import write_jsonl


def ranks(run: Any) -> list[int | None]:
    lines = (run.directory / "predictions.jsonl").read_text().splitlines()
    return [json.loads(line)["rank"] for line in lines]


def test_many_stores_find_what_one_store_finds(recipe: dict[str, Any], tmp_path: Path) -> None:
    federated = fedcustom.run(recipe, out=tmp_path / "run")
    pooled = fedcustom.run({**recipe, "baseline": "centralised"}, out=tmp_path / "pooled")
    assert ranks(federated) == ranks(pooled)
    for name in ("recall_at_1", "recall_at_5", "recall_at_10", "mrr"):
        assert federated.summary["metrics"][name] == pooled.summary["metrics"][name]
        assert federated.summary["untuned"][name] == pooled.summary["metrics"][name]
    assert federated.summary["metrics"]["clients_asked"] == 1.0
    content = json.loads((federated.directory / "retrieval.json").read_text())
    assert content["clients"] == ["site-0", "site-1", "site-2"]
    asked = content["searches"]["as set"]
    assert asked["bytes_down_per_query"] > 3 * 32 * 4  # the vector, to each of three
    assert federated.summary["client_count"] == 3


def test_the_bytes_of_a_query_are_shown(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Down: twelve questions' vectors of 32 numbers go to each of three clients, in a message each."""
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(load_recipe(recipe)))
    done = CliRunner().invoke(app, ["run", str(path), "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    values = {"kind": "retrieve", "encoder": 64 * "0", "top": 10}
    message = len(wire.encode({"queries": torch.zeros(12, 32)}, values))
    sent = fedcustom.load(tmp_path / "run").summary["bytes"]
    assert sent["down_per_query"] == round(3 * message / 12)
    # Up: of each question and client ten names (16 bytes of a hash at least) and scores.
    assert 3 * 10 * (16 + 4) < sent["up_per_query"] < 3 * 10 * (64 + 8)
    assert f"bytes a query {sent['down_per_query']:,} down, {sent['up_per_query']:,} up" in done.output
    heading = next(line for line in done.output.splitlines() if "params" in line)
    assert heading.split("sent")[1].split()[:2] == ["a", "query"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "A query costs" in page
    assert page.count("<small>a query</small>") == 2
    pooled = fedcustom.run({**recipe, "baseline": "centralised"}, out=tmp_path / "pooled")
    assert "down_per_query" not in pooled.summary["bytes"]


def test_a_run_can_be_asked(recipe: dict[str, Any], tmp_path: Path) -> None:
    run = fedcustom.run(recipe, out=tmp_path / "run")
    question = rows(1)[0]["question"]
    reply = library.ask(run.directory, question, top=4)
    assert len(reply.passages) == 4
    assert [p.score for p in reply.passages] == sorted((p.score for p in reply.passages), reverse=True)
    assert all(p.text for p in reply.passages)
    assert reply.clients_asked == ["site-0", "site-1", "site-2"]
    assert reply.bytes_up > 0
    done = CliRunner().invoke(app, ["ask", str(run.directory), question, "--top", "2"])
    assert done.exit_code == 0, done.output
    assert f"[1] {reply.passages[0].client}" in done.output
    assert f"{reply.passages[0].score:.4f}" in done.output


def test_policies(recipe: dict[str, Any], tmp_path: Path, tiny: dict[str, str]) -> None:
    policies = {"site-0": "passages", "site-1": "scores", "site-2": "answer"}
    held = changed(
        recipe,
        share_of=policies,
        send_query_text=True,
        generator=tiny["llama"],
        answer_tokens=8,
        passages_given=2,
    )
    run = fedcustom.run(held, out=tmp_path / "run")
    asked = library.Library(run.directory)
    reply = asked.ask("the cat near the dog", top=10)
    for passage in reply.passages:
        assert (passage.text is not None) == (passage.client == "site-0")
    shown = [i + 1 for i, p in enumerate(reply.passages) if p.client == "site-0"]
    assert reply.cited == shown[:2] or not shown
    alone = fedcustom.run(changed(held, share_of={}, share="answer"), out=tmp_path / "alone")
    reply = library.ask(alone.directory, "the cat near the dog", top=3)
    assert all(p.text is None for p in reply.passages)
    first = reply.passages[0].client
    assert {reply.passages[i - 1].client for i in reply.cited} == {first}
    method = library.Library(alone.directory).method
    client = Client("site-0", ClientData("site-0", []))
    with pytest.raises(DataError, match="does not share passages"):
        method.execute(FetchTask(documents=[], encoder="e"), client)


@pytest.mark.parametrize("search", ["text", "hybrid"])
def test_words_find_their_document(recipe: dict[str, Any], tmp_path: Path, search: str) -> None:
    run = fedcustom.run(changed(recipe, search=search, send_query_text=True), out=tmp_path / "run")
    reply = library.ask(run.directory, "number 31", top=3)
    texts = [passage.text or "" for passage in reply.passages]
    wanted = {row["answer"] for row in rows(57) if row["answer"].endswith("number 31")}
    assert wanted
    if search == "text":
        site = f"site-{31 % 3}"
        assert site in {passage.client for passage in reply.passages}
    assert len(texts) == 3


def test_routing_asks_fewer(recipe: dict[str, Any], tmp_path: Path) -> None:
    run = fedcustom.run(changed(recipe, routing="learned", route_recall=0.5), out=tmp_path / "run")
    content = json.loads((run.directory / "retrieval.json").read_text())["searches"]
    assert content["as set"]["clients_asked"] < content["all clients asked"]["clients_asked"] == 1.0
    assert content["as set"]["bytes_down_per_query"] < content["all clients asked"]["bytes_down_per_query"]
    reply = library.ask(run.directory, "the cat near the dog")
    assert 1 <= len(reply.clients_asked) <= 3


def test_the_odds_of_the_router_are_added_to_scores(recipe: dict[str, Any], tmp_path: Path) -> None:
    """score + weight * log p(client | question), computed from the unweighted list of all documents."""
    searchers = {}
    for weight in (0.0, 0.3):
        method = changed(recipe, routing="learned", route_recall=1.0, top=100, router_weight=weight)
        library.index(method, tmp_path / str(weight))
        searchers[weight] = library.Library(tmp_path / str(weight)).method.searcher
        searchers[weight].ready.mass = 1.0  # ask all
    questions = [row["question"] for row in rows(12, 45)]
    plain, weighted = (searcher.search(questions) for searcher in searchers.values())
    router, names = searchers[0.0].ready.router, searchers[0.0].ready.clients
    assert router is not None
    logits = torch.from_numpy(plain.vectors).double() @ router[0].T + router[1]
    odds = torch.softmax(logits, dim=1).log()
    moved = False
    for i, hits in enumerate(plain.hits):
        raised = {h.document: h.score + 0.3 * float(odds[i, names.index(h.client)]) for h in hits}
        expected = sorted(raised, key=lambda document: (-raised[document], document))
        assert [hit.document for hit in weighted.hits[i]] == expected
        assert [hit.score for hit in weighted.hits[i]] == pytest.approx([raised[d] for d in expected])
        moved = moved or expected != [hit.document for hit in hits]
    assert moved
    unrouted = [searcher.search(questions, routed=False).hits for searcher in searchers.values()]
    assert unrouted[0] == unrouted[1]


def test_privacy_is_measured(recipe: dict[str, Any], tmp_path: Path) -> None:
    run = fedcustom.run(changed(recipe, privacy_epsilon=1e7), out=tmp_path / "run")
    plain = fedcustom.run(recipe, out=tmp_path / "plain")
    content = json.loads((run.directory / "retrieval.json").read_text())["searches"]
    expected = plain.summary["metrics"]
    assert {n: content["exact queries"][n] for n in expected} == expected
    noisy = fedcustom.run(changed(recipe, privacy_epsilon=10.0), out=tmp_path / "noisy")
    assert noisy.summary["metrics"]["mrr"] != plain.summary["metrics"]["mrr"]


@pytest.mark.parametrize(("train", "shared"), [("lora", 0), ("full", 0), ("full", 3)])
def test_training_goes_on_after_a_stop(
    recipe: dict[str, Any], tmp_path: Path, train: str, shared: int
) -> None:
    held = {
        **changed(recipe, train=train, temperature=0.2, shared_negatives=shared),
        "rounds": {"count": 3},
        "training": {"local_steps": 2, "batch_size": 6, "learning_rate": 1e-3},
        "evaluation": {"select": "last", "untuned": False},
    }
    whole = fedcustom.run(held, out=tmp_path / "whole")
    if not shared:  # from round 2 on there are more passages to tell a question apart from
        assert whole.history["train_loss"].iloc[-1] < whole.history["train_loss"].iloc[0]

    class Stop(Callback):
        def on_round_end(self, row: Any) -> None:
            if row["round"] == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedcustom.run(held, out=tmp_path / "run", callbacks=[Stop()])
    again = fedcustom.run(held, out=tmp_path / "run", resume=True)
    assert ranks(again) == ranks(whole)
    assert list(again.history["train_loss"]) == list(whole.history["train_loss"])
    reply = library.ask(again.directory, rows(1)[0]["question"])
    before = library.ask(whole.directory, rows(1)[0]["question"])
    assert reply.passages == before.passages
    if train == "full":
        import transformers

        model = transformers.AutoModel.from_pretrained(whole.directory / "model")
        assert model.config.hidden_size == 32
        assert json.loads((whole.directory / "model" / "modules.json").read_text())[1]["path"] == "1_Pooling"


def test_clients_lend_each_other_negatives(
    recipe: dict[str, Any], tmp_path: Path, tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From round 2 on a client gets the vectors, by that round's encoder, of passages of the others
    whose policy lets passages out; and trains with them.
    """
    held = {
        **changed(recipe, train="full", shared_negatives=4, share_of={"site-1": "scores"}),
        "rounds": {"count": 2},
        "training": {"local_steps": 2, "batch_size": 6, "learning_rate": 1e-3},
        "evaluation": {"select": "last", "untuned": False},
    }
    seen: list[tuple[int, str, Task, Update, ClientData]] = []
    work = Retrieval.execute

    def recorded(self: Retrieval, task: Task, client: Client) -> Update:
        update = work(self, task, client)
        if isinstance(task, TrainTask):
            seen.append((task.round_number, client.name, task, update, client.data))
        return update

    monkeypatch.setattr(Retrieval, "execute", recorded)
    run = fedcustom.run(held, out=tmp_path / "run")
    base = load_base(ModelSettings(base=tiny["bert"]), LearningTask("retrieval"), 0, head=False)
    lent: dict[str, torch.Tensor] = {}
    for number, name, task, update, data in seen:
        assert (BORROWED in task.tensors) == (number == 2)
        assert (LENT in update.tensors) == (number == 1 and name != "site-1")  # nobody borrows after the last
        if number == 1 and name != "site-1":
            assert update.tensors[LENT].shape == (4, 32)
            passages = sorted({example.target for example in data.train})
            own = torch.from_numpy(embed(base, passages, max_length=24, batch_size=8))
            nearest = (update.tensors[LENT].float() @ own.T).max(dim=1).values
            assert torch.allclose(nearest, torch.ones(4), atol=2e-3)
            lent[name] = update.tensors[LENT]
        if number == 2:
            others = torch.cat([vectors for owner, vectors in sorted(lent.items()) if owner != name])
            assert torch.equal(task.tensors[BORROWED], others)
    assert len(seen) == 6

    without = fedcustom.run(changed(held, shared_negatives=0), out=tmp_path / "without")
    first, second = (list(r.history["train_loss"]) for r in (run, without))
    assert first[-2] == second[-2]  # nothing is borrowed yet
    assert first[-1] > second[-1] + 0.1  # log of more terms


def test_lent_vectors_are_checked(recipe: dict[str, Any]) -> None:
    settings = RetrievalSettings(train="full", shared_negatives=4)
    negatives = Negatives(settings, 0, 2, lambda texts: np.zeros((len(texts), 2), dtype=np.float32))
    unit = torch.nn.functional.normalize(torch.ones(4, 2)).half()
    negatives.check(Update({LENT: unit}), 2)
    negatives.check(Update({}), 2)
    bad = [
        unit.float(),
        torch.cat([unit, unit]),
        unit[0],
        unit * 2,
        unit * torch.nan,
        torch.ones(4, 3).half(),
    ]
    for vectors in bad:
        with pytest.raises(UpdateError, match="negatives/lent"):
            negatives.check(Update({LENT: vectors}), 2)
    with pytest.raises(UpdateError, match="wrong tensor names: negatives/more"):
        negatives.check(Update({LENT: unit, "negatives/more": unit}), 2)


def test_what_is_lent_is_kept_for_one_round() -> None:
    settings = RetrievalSettings(train="full", shared_negatives=4)
    negatives = Negatives(settings, 0, 9, lambda texts: np.zeros((len(texts), 2), dtype=np.float32))
    state = negatives.kept(State({}, {"m/w": torch.ones(1)}), {"b": torch.ones(1, 2), "a": torch.zeros(2, 2)})
    tasks = negatives.offered(state, {name: TrainTask(round_number=1) for name in ("a", "b", "c")})
    assert tasks["a"].tensors[BORROWED].tolist() == [[1, 1]]
    assert tasks["c"].tensors[BORROWED].tolist() == [[0, 0], [0, 0], [1, 1]]
    state = negatives.kept(state, {"b": torch.ones(1, 2)})
    assert state.server.keys() == {"m/w", "negatives/lent/b"}
    assert BORROWED not in negatives.offered(state, {"b": TrainTask(round_number=1)})["b"].tensors


def test_a_trained_run_keeps_the_index_of_its_encoder_alone(recipe: dict[str, Any], tmp_path: Path) -> None:
    held = {
        **changed(recipe, train="full"),
        "training": {"local_steps": 2, "batch_size": 6, "learning_rate": 1e-3},
        "evaluation": {"untuned": True},
    }
    run = fedcustom.run(held, out=tmp_path / "run")
    for client in ("site-0", "site-1", "site-2"):
        assert len(list((run.directory / "clients" / client).glob("store-*"))) == 1
    assert library.ask(run.directory, rows(1)[0]["question"]).passages

    with pytest.raises(RecipeError, match=r"method.train = 'full': an index is built with the encoder"):
        library.index(held, tmp_path / "index")


def test_answers_with_passages_are_measured(
    recipe: dict[str, Any], tmp_path: Path, tiny: dict[str, str]
) -> None:
    held = changed(recipe, generator=tiny["llama"], answer_tokens=16, measured_answers=5, rerank=True)
    run = fedcustom.run(held, out=tmp_path / "run")
    losses = json.loads((run.directory / "retrieval.json").read_text())["answer_loss"]
    assert losses["questions"] == 5
    method = library.Library(run.directory).method
    assert method.generator is not None
    chosen = rows(12, 45)[:5]
    base, total, count = method.generator.base, 0.0, 0
    for row in chosen:
        prompt = base.tokenizer(f"Question: {row['question']}\nAnswer:", add_special_tokens=False)[
            "input_ids"
        ]
        target = base.tokenizer(" " + row["answer"], add_special_tokens=False)["input_ids"][:16]
        with torch.no_grad():
            logits = base.model(torch.tensor([[*prompt[-48:], *target]])).logits[0]
        odds = torch.log_softmax(logits[-len(target) - 1 : -1].double(), dim=1)
        total -= float(odds[range(len(target)), target].sum())
        count += len(target)
    assert losses["without passages"] == pytest.approx(total / count, rel=1e-4)


def test_an_index_is_updated(recipe: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "index"
    file = tmp_path / "recipe.toml"
    file.write_text(to_toml(load_recipe(recipe)))
    done = CliRunner().invoke(app, ["index", str(file), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "site-0: 19 documents" in done.output
    source = Path(recipe["data"]["source"])
    write_jsonl(source / "train.jsonl", [*rows(45), *rows(3, 100)])
    assert library.index(recipe, out) == {"site-0": 20, "site-1": 20, "site-2": 20}
    reply = library.ask(out, "the cat near the dog", top=100)
    assert len(reply.passages) == 10


def test_what_cannot_be_asked(recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no index; build one with fedcustom index"):
        library.ask(tmp_path, "what?")
    run = fedcustom.run(recipe, out=tmp_path / "run")
    with pytest.raises(RunError, match="the question is empty"):
        library.ask(run.directory, "  ")
    notes: list[str] = []
    assert library.ask(run.directory, "the cat " * 40, note=notes.append).passages
    assert "those after the first 16 (data.max_length) are not looked at" in notes[0]
    assert CliRunner().invoke(app, ["ask", str(tmp_path / "none"), "what?"]).exception is not None
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    with pytest.raises(RunError, match="holds no index; name another"):
        library.index(recipe, tmp_path / "other")
    with pytest.raises(RecipeError, match="only method retrieval has an index"):
        library.index({}, tmp_path / "new")


def test_a_client_without_documents_is_left_out(recipe: dict[str, Any], tmp_path: Path) -> None:
    run = fedcustom.run(recipe, out=tmp_path / "run")
    asked = library.Library(run.directory)
    notes: list[str] = []
    method = library._connected(
        asked.recipe,
        tmp_path / "fresh",
        {"a": ClientData("a", []), "b": ClientData("b", [])},
        None,
        notes.append,
    )
    with pytest.raises(RunError, match="no client has documents"):
        method.prepare(method.initialise())
    assert notes == [
        "client a left out: client 'a' has no documents",
        "client b left out: client 'b' has no documents",
    ]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"method": {"name": "retrieval", "chunk_overlap": 128}},
            RecipeError,
            "chunk_overlap = 128: must be below",
        ),
        ({"method": {"name": "retrieval", "search": "text"}}, RecipeError, "set method.send_query_text"),
        ({"method": {"name": "retrieval", "share_of": {"a": "all"}}}, RecipeError, "share_of.a = 'all'"),
        ({"method": {"name": "retrieval", "rerank": True}}, RecipeError, "rerank: needs method.generator"),
        (
            {"method": {"name": "retrieval", "shared_negatives": 8}},
            RecipeError,
            "shared_negatives = 8: needs method.train = 'full' or 'lora'",
        ),
        (
            {
                "method": {"name": "retrieval", "train": "full", "shared_negatives": 8},
                "compression": {"kind": "top_k"},
            },
            RecipeError,
            "compression.kind = 'top_k': is for changes of weights",
        ),
        (
            {
                "method": {"name": "retrieval", "train": "full", "shared_negatives": 8},
                "attack": {"kind": "sign_flip"},
            },
            RecipeError,
            "attack.kind = 'sign_flip': is for changes of weights",
        ),
        (
            {
                "method": {"name": "retrieval", "train": "full", "shared_negatives": 8},
                "aggregation": {"rule": "fltrust"},
            },
            RecipeError,
            "rule = 'fltrust': the server's own training has no negatives",
        ),
        (
            {"method": {"name": "retrieval", "train": "full", "shared_negatives": 8, "share": "scores"}},
            RecipeError,
            "no client lends any while method.share = 'scores'",
        ),
        (
            {"method": {"name": "retrieval", "router_weight": 0.1}},
            RecipeError,
            "router_weight = 0.1: needs method.routing = 'learned', and vectors",
        ),
        (
            {"method": {"name": "retrieval", "privacy_epsilon": 1.0, "send_query_text": True}},
            RecipeError,
            "protects nothing",
        ),
        ({"method": {"name": "retrieval", "chunk_length": 63}}, ModelError, "sees 64 tokens at once, not 65"),
        ({"rounds": {"count": 2}}, RecipeError, "nothing to repeat"),
        ({"baseline": "local"}, RecipeError, "allowed for method.name = 'retrieval': federated, centralised"),
        ({"data": {"task": "classification"}}, RecipeError, "data.task = 'classification': allowed for"),
        ({"method": {"name": "prefix"}}, RecipeError, "data.task = 'retrieval': allowed for"),
        ({"personalisation": {"finetune_epochs": 1}}, RecipeError, "has no meaning for method.name"),
        ({"evaluation": {"metric": "accuracy"}}, RecipeError, "recall_at_1"),
    ],
)
def test_what_does_not_fit(
    recipe: dict[str, Any], tmp_path: Path, change: dict[str, Any], error: type[FedcustomError], message: str
) -> None:
    with pytest.raises(error, match=message.replace("(", r"\(")):
        fedcustom.run({**recipe, **change}, out=tmp_path / "run")


def test_a_file_that_is_not_utf8(recipe: dict[str, Any], tmp_path: Path) -> None:
    file = Path(recipe["data"]["source"]) / "train.jsonl"
    file.write_bytes(b'{"question": "a", "answer": "caf\xe9", "site": "s"}\n')
    with pytest.raises(DataError, match=r"train.jsonl: not UTF-8 text \(line 1, byte 33 of the file\)"):
        fedcustom.run(recipe, out=tmp_path / "run")
