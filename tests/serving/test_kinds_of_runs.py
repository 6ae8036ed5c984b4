"""Every kind of run is served, and answers as its own ``predict`` and ``ask`` do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

import fedcustom
from fedcustom import library
from fedcustom.methods.registry import names
from helpers.retrieval import rows
from helpers.rows import make_rows, write_jsonl

SHORT = {
    "rounds.count": 1, "training.batch_size": 8, "evaluation.generate": False, "evaluation.untuned": False,
}  # fmt: skip
TRAINED = {**SHORT, "training.local_steps": 1}

WRITERS: dict[str, dict[str, Any]] = {
    "prefix memory": {"name": "prefix", "length": 4},
    "key-value prefix": {"name": "prefix", "kind": "kv", "length": 4},
    "soft prompt": {"name": "soft_prompt", "length": 3},
    "full": {"name": "full"},
    "ia3": {"name": "ia3"},
    "distillation": {"name": "distillation", "top_k": 4},
    "selection": {"name": "prompt_engineering", "examples": 6, "instructions": ["{input} :", "text {input}"]},
    "in context": {"name": "prompt_engineering", "strategy": "in_context", "demonstrations": 2},
    "black box": {
        "name": "prompt_engineering", "strategy": "black_box", "prompt_length": 3, "dimensions": 6,
        "local_generations": 1, "examples": 4,
    },
    "few-shot": {"name": "untuned", "shots": 2},
}  # fmt: skip


def checked(server: Any, run: fedcustom.Run, inputs: list[Any]) -> None:
    """The server's texts are the run's own, whole and in pieces."""
    for given, wanted in zip(inputs, run.predict(inputs), strict=True):
        row = {"extra_body": {"row": given}}
        body: Any = {"model": "run", "prompt": "", **({"prompt": given} if isinstance(given, str) else row)}
        client = server.client()
        said = client.completions.create(**body, temperature=0)
        assert said.choices[0].text == wanted["text"]
        pieces = list(client.completions.create(**body, stream=True))
        assert "".join(piece.choices[0].text for piece in pieces) == wanted["text"]
        assert pieces[-1].choices[0].finish_reason == said.choices[0].finish_reason
        short = client.completions.create(**body, max_tokens=2)
        assert short.usage.completion_tokens <= 2
        if run.recipe.evaluation.beams == 1:
            assert wanted["text"].startswith(short.choices[0].text)


@pytest.mark.parametrize("kind", WRITERS)
def test_models_that_write(
    generation: dict[str, Any],
    tiny: dict[str, str],
    tmp_path: Path,
    serve: Callable[..., Any],
    kind: str,
) -> None:
    method = WRITERS[kind]
    recipe = {**generation, "method": method, "evaluation": {"max_new_tokens": 6}}
    changes = TRAINED if method["name"] != "prompt_engineering" else dict(SHORT)
    if method["name"] == "prompt_engineering":
        changes.pop("training.batch_size")
        del recipe["training"]
    if kind == "few-shot":
        recipe["baseline"] = "centralised"
    if method.get("strategy") == "in_context":
        recipe["method"] = {**method, "retriever": tiny["bert"]}
    if kind in ("in context", "distillation"):
        write_jsonl(
            tmp_path / "public.jsonl",
            [{"source": f"public river number {i}", "target": "."} for i in range(6)],
        )
        recipe["public"] = {"source": str(tmp_path / "public.jsonl")}
    run = fedcustom.run(recipe, changes, out=tmp_path / "run")
    texts = [row["source"] for row in make_rows(2, 7)]
    checked(serve(tmp_path / "run"), run, [*texts, {"source": texts[0]}])


def test_beams_and_an_encoder_decoder(
    generation: dict[str, Any], tiny: dict[str, str], tmp_path: Path, serve: Callable[..., Any]
) -> None:
    recipe = {**generation, "model": {"base": tiny["bart"]}, "method": {"name": "lora", "rank": 2}}
    recipe["evaluation"] = {"max_new_tokens": 6}
    run = fedcustom.run(recipe, TRAINED, out=tmp_path / "run")
    checked(serve(tmp_path / "run"), run, ["the old cat"])
    recipe |= {"model": {"base": tiny["llama"]}, "evaluation": {"max_new_tokens": 6, "beams": 3}}
    run = fedcustom.run(recipe, TRAINED, out=tmp_path / "beams" / "run")
    checked(serve(tmp_path / "beams" / "run"), run, ["the old cat"])


@pytest.mark.parametrize(
    ("base", "method"),
    [
        ("bert", {"name": "prefix", "length": 4}),
        ("llama", {"name": "lora", "rank": 2}),
        ("bert", {"name": "probe"}),
        ("bert", {"name": "prompt_engineering", "examples": 6, "instructions": ["{label}", "a {label}"]}),
    ],
    ids=["prefix", "lora", "probe", "prompt engineering"],
)
def test_classifiers(
    small: dict[str, Any],
    tiny: dict[str, str],
    tmp_path: Path,
    serve: Callable[..., Any],
    base: str,
    method: dict[str, Any],
) -> None:
    recipe = {**small, "model": {"base": tiny[base]}, "method": method, "rounds": {"count": 1}}
    if method["name"] in ("prompt_engineering", "probe"):
        del recipe["training"]
    run = fedcustom.run(recipe, out=tmp_path / "run")
    server = serve(tmp_path / "run")
    texts = ["the old cat", "bread and soup " * 20]
    said = server.http.post("/v1/classify", json={"model": "run", "input": texts})
    assert said.status_code == 200, said.text
    wanted = run.predict(texts)
    found = said.json()
    assert [each["label"] for each in found["data"]] == [each["label"] for each in wanted]
    for one, other in zip(found["data"], wanted, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-6)
        assert one["probability"] == max(one["probabilities"].values())
    assert found["truncated_tokens"] == sum(run.count_cuts(texts).tokens.values()) > 0
    one = server.http.post("/v1/classify", json={"input": {"text": texts[0]}}).json()
    assert one["data"][0]["probabilities"] == pytest.approx(wanted[0]["probabilities"], abs=1e-5)
    assert "truncated_tokens" not in one
    cut = server.http.post("/v1/classify", json={"input": texts, "truncation": "disabled"})
    assert cut.status_code == 400
    assert "1 of 2 are longer than data.max_length = 24" in cut.json()["error"]["message"]
    for bad, message in (
        ({"input": []}, "at least 1"),
        ({"input": [""]}, "'text' is empty"),
        ({"input": {"other": "x"}}, "no column 'text'"),
        ({}, "input: is missing"),
        ({"input": "x", "n": 1, "top": 3}, "top: is not a known field"),
    ):
        refused = server.http.post("/v1/classify", json=bad)
        assert refused.status_code == 400
        assert message in refused.json()["error"]["message"]
    with pytest.raises(openai.BadRequestError, match="it answers /v1/classify"):
        server.client().completions.create(model="run", prompt="x")


def test_documents(tiny: dict[str, str], tmp_path: Path, serve: Callable[..., Any]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_jsonl(source / "train.jsonl", rows(45))
    write_jsonl(source / "test.jsonl", rows(12, 45))
    recipe: dict[str, Any] = {
        "model": {"base": tiny["bert"]},
        "data": {
            "source": str(source), "task": "retrieval", "test": "test", "prompt": "{question}",
            "target": "{answer}", "max_length": 16, "max_target_length": 24,
        },
        "clients": {"partition": "natural", "column": "site", "test_fraction": 0.0},
        "method": {
            "name": "retrieval", "chunk_length": 12, "chunk_overlap": 4, "generator": tiny["llama"],
            "answer_tokens": 8, "passages_given": 2,
        },
        "rounds": {"count": 1},
    }  # fmt: skip
    fedcustom.run(recipe, out=tmp_path / "run")
    server = serve(tmp_path / "run")
    question = rows(1)[0]["question"]
    wanted = library.ask(tmp_path / "run", question)
    said = server.http.post("/v1/ask", json={"question": question}).json()
    assert said["answer"] == wanted.answer
    assert said["cited"] == wanted.cited == [1, 2]
    assert said["clients_asked"] == wanted.clients_asked
    for number, (one, other) in enumerate(zip(said["passages"], wanted.passages, strict=True), start=1):
        assert one["score"] == pytest.approx(other.score, abs=1e-6)
        assert (one["number"], one["client"], one["document"], one["text"]) == (
            number, other.client, other.document, other.text,
        )  # fmt: skip
    assert len(server.http.post("/v1/ask", json={"question": question, "top": 3}).json()["passages"]) == 3
    messages: Any = [{"role": "user", "content": question}]
    chat: Any = server.client().chat.completions.create(model="run", messages=messages)
    message = chat.choices[0].message
    first = wanted.passages[0]
    assert message.content.startswith(wanted.answer)
    assert f"\n[1] {first.client}: {first.document}" in message.content
    assert [each["number"] for each in message.citations] == [1, 2]
    pieces: Any = list(server.client().chat.completions.create(model="run", messages=messages, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == message.content
    assert pieces[-1].choices[0].delta.citations == message.citations
    for changes, text in (
        ({"temperature": 0.7}, "temperature: answers from documents"),
        ({"messages": [*messages, *messages]}, "takes one question, not 2 messages"),
    ):
        refused = server.http.post(
            "/v1/chat/completions", json={"model": "run", "messages": messages, **changes}
        )
        assert refused.status_code == 400
        assert text in refused.json()["error"]["message"]
    assert server.http.post("/v1/ask", json={"question": " "}).json()["error"]["message"] == (
        "the question is empty"
    )


def test_no_kind_of_method_is_left_out() -> None:
    """A new method has to be looked at here."""
    served = {each["name"] for each in WRITERS.values()} | {"lora", "probe", "retrieval"}
    alike = {"adapter", "bitfit", "ln_tuning"}  # trained tensors in a model, as ia3 has
    assert served | alike == set(names())
