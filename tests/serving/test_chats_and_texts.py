"""OpenAI's client against a server: chats and texts equal the run's own, and errors have OpenAI's shape."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

import fedcustom
from fedcustom.api import Run
from fedcustom.serving.app import Limits
from helpers.conversations import chat_recipe, taught_llama

FIRST = [{"role": "user", "content": "Who is the cat?"}]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A LoRA adapter of a model that knows its ten conversations."""
    place = tmp_path_factory.mktemp("chat")
    recipe = chat_recipe(place, taught_llama(place / "llama"))
    recipe |= {"rounds": {"count": 1}, "training": {"batch_size": 5, "local_steps": 1}}
    recipe["evaluation"] = {"max_new_tokens": 40, "generate": False, "untuned": False}
    return fedcustom.run(recipe, out=place / "assistant")


@pytest.fixture(scope="module")
def server(run: Run, serve: Callable[..., Any]) -> Any:
    return serve(run.directory)


@pytest.fixture(scope="module")
def client(server: Any) -> openai.OpenAI:
    return server.client()


def tokens_of(run: Run, messages: list[dict[str, str]]) -> int:
    """The length of the prompt by ``transformers`` alone."""
    found = run.tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return len(found["input_ids"])


def test_a_conversation_is_answered_as_by_the_run(run: Run, client: openai.OpenAI) -> None:
    history = list(FIRST)
    for question in ("And its friend?", "Who is the dog?", None):
        wanted = run.chat(history)
        said = client.chat.completions.create(model="assistant", messages=history, temperature=0)
        (choice,) = said.choices
        assert choice.message.content == wanted.text
        assert choice.message.role == "assistant"
        assert choice.finish_reason == ("stop" if wanted.ended else "length")
        assert said.object == "chat.completion"
        assert said.model == "assistant"
        assert said.usage.prompt_tokens == tokens_of(run, history)
        ids = run.tokenizer()(wanted.text, add_special_tokens=False)["input_ids"]
        assert said.usage.completion_tokens == len(ids) + wanted.ended
        assert said.usage.total_tokens == said.usage.prompt_tokens + said.usage.completion_tokens
        history += [
            {"role": "assistant", "content": wanted.text},
            {"role": "user", "content": question or ""},
        ]


def test_a_stream_has_the_same_text_in_pieces(run: Run, client: openai.OpenAI) -> None:
    wanted = run.chat(FIRST)
    asked = {"model": "assistant", "messages": FIRST, "stream": True}
    pieces = list(client.chat.completions.create(**asked, stream_options={"include_usage": True}))
    texts = [piece.choices[0].delta.content or "" for piece in pieces if piece.choices]
    assert "".join(texts) == wanted.text
    assert sum(map(bool, texts)) > 3, "not piece by piece"
    assert pieces[0].choices[0].delta.role == "assistant"
    assert len({piece.id for piece in pieces}) == 1
    reasons = [piece.choices[0].finish_reason for piece in pieces if piece.choices]
    assert reasons == [None] * (len(reasons) - 1) + ["stop"]
    assert pieces[-1].choices == []
    whole = client.chat.completions.create(model="assistant", messages=FIRST)
    assert pieces[-1].usage == whole.usage
    assert all(piece.usage is None for piece in client.chat.completions.create(**asked))


def test_texts_of_a_model_of_conversations_are_a_users_turn(run: Run, client: openai.OpenAI) -> None:
    (wanted,) = run.predict(["Who is the hen?"])
    said = client.completions.create(model="assistant", prompt="Who is the hen?", temperature=0)
    assert said.choices[0].text == wanted["text"]
    assert said.object == "text_completion"
    pieces = list(client.completions.create(model="assistant", prompt=["Who is the hen?"], stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == wanted["text"]


def test_max_tokens_ends_an_answer(run: Run, client: openai.OpenAI) -> None:
    text = run.chat(FIRST).text
    ids = run.tokenizer()(text, add_special_tokens=False)["input_ids"]
    for name in ("max_tokens", "max_completion_tokens"):
        said: Any = client.chat.completions.create(model="assistant", messages=FIRST, extra_body={name: 3})
        assert said.choices[0].finish_reason == "length"
        assert said.usage.completion_tokens == 3
        assert said.choices[0].message.content == run.tokenizer().decode(ids[:3]).strip()


@pytest.mark.parametrize("stop", ["number", ["zebra", " has"], ["the whole"], "T"])
def test_stop_texts_end_an_answer_before_them(run: Run, client: openai.OpenAI, stop: str | list[str]) -> None:
    text = run.chat(FIRST).text
    stop = [text] if stop == ["the whole"] else stop
    places = [text.find(each) for each in ([stop] if isinstance(stop, str) else stop) if each in text]
    assert places
    said = client.chat.completions.create(model="assistant", messages=FIRST, stop=stop)
    assert said.choices[0].message.content == text[: min(places)].strip()
    assert said.choices[0].finish_reason == "stop"
    pieces = client.chat.completions.create(model="assistant", messages=FIRST, stop=stop, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text[: min(places)].strip()


def test_a_stop_text_that_does_not_occur_changes_nothing(run: Run, client: openai.OpenAI) -> None:
    text = run.chat(FIRST).text
    half = text[len(text) // 2 : -1] + "#"  # its beginning occurs
    pieces = client.chat.completions.create(model="assistant", messages=FIRST, stop=half, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text


def test_draws_depend_on_the_seed(client: openai.OpenAI) -> None:
    def said(seed: int | None) -> str:
        asked = {"model": "assistant", "messages": FIRST, "temperature": 2, "max_tokens": 24}
        return str(client.chat.completions.create(**asked, seed=seed).choices[0].message.content)

    assert said(1) == said(1)
    assert len({said(1), said(2), said(3)}) > 1
    assert len({said(None) for _ in range(3)}) > 1
    asked = {"model": "assistant", "messages": FIRST, "temperature": 2, "top_p": 1e-6}
    certain = client.chat.completions.create(**asked, seed=5).choices[0].message.content
    assert (
        certain
        == client.chat.completions.create(model="assistant", messages=FIRST).choices[0].message.content
    )


def test_content_in_parts_and_the_developers_message(run: Run, client: openai.OpenAI) -> None:
    messages: list[Any] = [
        {"role": "developer", "content": "You are a helpful AI assistant"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Who is "}, {"type": "text", "text": "the cat?"}],
        },
    ]
    wanted = run.chat([{"role": "system", "content": "You are a helpful AI assistant"}, *FIRST])
    said = client.chat.completions.create(model="assistant", messages=messages, user="x", n=1, logprobs=False)
    assert said.choices[0].message.content == wanted.text


def test_a_model_is_listed(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("assistant", "model", "fedcustom")
    assert client.models.retrieve("assistant") == model
    with pytest.raises(openai.NotFoundError, match="there is no 'other'"):
        client.models.retrieve("other")


LONG = "cat " * 300


@pytest.mark.parametrize(
    ("changes", "status", "param", "message"),
    [
        ({"model": "other"}, 404, "model", "model: there is no 'other'; allowed: 'assistant'"),
        ({"model": None}, 400, "model", "model: is missing"),
        ({"messages": []}, 400, "messages", "messages: list should have at least 1 item"),
        (
            {"messages": [*FIRST, {"role": "assistant", "content": "x"}]},
            400,
            "messages",
            "must be the user's",
        ),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            400,
            "messages",
            "messages.0.role: input should be",
        ),
        ({"messages": [{"role": "user", "content": " "}]}, 400, "messages", "is blank"),
        ({"messages": [{"role": "user", "content": "a <|im_end|>"}]}, 400, "messages", "control token"),
        ({"messages": [{"role": "user", "content": LONG}]}, 400, "messages", "data.max_length = 200"),
        ({"n": 2}, 400, "n", "n: is not supported; allowed: 1, or nothing"),
        ({"logprobs": True}, 400, "logprobs", "logprobs: is not supported"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "tools: is not supported"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty", "is not supported"),
        ({"max_tokens": 0}, 400, "max_tokens", "max_tokens: input should be greater than or equal to 1"),
        ({"max_tokens": 5000}, 400, "max_tokens", "at most 4096"),
        ({"max_tokens": 250}, 400, "max_tokens", "the model has positions for"),
        ({"temperature": 3}, 400, "temperature", "less than or equal to 2"),
        ({"top_p": 0.5}, 400, "top_p", "top_p: "),
        ({"top_p": 0.5, "temperature": 0}, 400, "top_p", "with a temperature above 0 alone"),
        ({"stop": ["a", "b", "c", "d", "e"]}, 400, "stop", "at most 4"),
        ({"stop": ""}, 400, "stop", "at least 1 character"),
        ({"beams": 4}, 400, "beams", "beams: is not a known field; allowed: "),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refusals_have_openais_shape(
    server: Any, changes: dict[str, Any], status: int, param: str, message: str
) -> None:
    body = {"model": "assistant", "messages": FIRST, **changes}
    for streams in (False, True):
        said = server.http.post("/v1/chat/completions", json={**body, "stream": streams})
        assert said.status_code == status, said.text
        error = said.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert message in error["message"]
        assert "\n" not in error["message"]
        assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert server.log == []


def test_what_is_no_request_is_refused(server: Any) -> None:
    url, kind = "/v1/chat/completions", {"content-type": "application/json"}
    for content, message in ((b"{", "malformed"), (b"[]", "must be a JSON object"), (b"\xff", "not UTF-8")):
        said = server.http.post(url, content=content, headers=kind)
        assert said.status_code == 400
        assert message in said.json()["error"]["message"]
    plain = server.http.post(url, content=b"{}", headers={"content-type": "text/plain"})
    assert (plain.status_code, plain.json()["error"]["code"]) == (415, "content_type")
    named = server.http.post(url, json={}, headers={"host": "evil.example"})
    assert (named.status_code, named.json()["error"]["code"]) == (403, "wrong_host")
    assert server.http.get("/v1/nothing").json()["error"]["code"] == "unknown_url"
    assert server.http.get(url).status_code == 405
    for other in ("/v1/classify", "/v1/ask"):
        said = server.http.post(other, json={"input": "x"} if other == "/v1/classify" else {"question": "x"})
        assert said.status_code == 400
        assert "it answers /v1/chat/completions and /v1/completions" in said.json()["error"]["message"]
    assert server.http.get("/health").json() == {"status": "ok"}


def test_a_long_conversation_loses_its_oldest_exchanges_where_that_is_asked_for(
    run: Run, client: openai.OpenAI
) -> None:
    turn = [{"role": "user", "content": "cat " * 40}, {"role": "assistant", "content": "The cat."}]
    messages: Any = [*turn * 4, *FIRST]
    wanted = run.chat(messages)
    assert wanted.dropped
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="assistant", messages=messages)
    assert refused.value.code == "context_length_exceeded"
    assert f"{wanted.dropped} tokens longer" in str(refused.value)
    said: Any = client.chat.completions.create(
        model="assistant", messages=messages, extra_body={"truncation": "auto"}
    )
    assert said.choices[0].message.content == wanted.text
    assert said.truncated_tokens == wanted.dropped


def slow(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.02) -> list[int]:
    """Makes every token take so long; gives the number of tokens that were written."""
    from fedcustom.models import writing

    counted, plain = [0], writing._Stream.put

    def put(self: Any, value: Any) -> None:
        counted[0] += 1
        time.sleep(seconds)
        plain(self, value)

    monkeypatch.setattr(writing._Stream, "put", put)
    return counted


RANDOM = {"model": "assistant", "messages": FIRST, "temperature": 2, "seed": 1, "max_tokens": 200}


def long_request(client: openai.OpenAI) -> tuple[dict[str, Any], int]:
    """One whose answer has some tokens, and how many: a draw may end an answer at once, and draws differ
    between processors.
    """
    for seed in range(200):
        request: dict[str, Any] = {**RANDOM, "seed": seed}
        answer: Any = client.chat.completions.create(**request)
        if answer.usage.completion_tokens >= 20:
            return request, answer.usage.completion_tokens
    raise AssertionError("every answer is short")


def test_a_caller_that_leaves_stops_the_model(
    server: Any, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, tokens = long_request(client)
    counted = slow(monkeypatch, 0.1)
    stream: Any = client.chat.completions.create(**request, stream=True)
    next(iter(stream))
    stream.close()
    client.chat.completions.create(model="assistant", messages=FIRST, max_tokens=1)
    first = counted[0]
    assert first < tokens, "the model wrote on"
    with pytest.raises(openai.APITimeoutError):
        server.client(timeout=0.2).chat.completions.create(**request)
    client.chat.completions.create(model="assistant", messages=FIRST, max_tokens=1)
    assert counted[0] - first < tokens


def test_requests_wait_for_each_other(
    run: Run, serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is held up until two of the others were refused."""
    from fedcustom.models import writing

    server = serve(run.directory, Limits(waiting=1, seconds=120))
    text = run.chat(FIRST).text
    held, plain, refused = threading.Event(), writing._Stream.put, threading.Semaphore(0)
    found = list[Any]()

    def put(self: Any, value: Any) -> None:
        held.wait(60)
        plain(self, value)

    def ask(client: openai.OpenAI) -> None:
        try:
            said = client.chat.completions.create(model="assistant", messages=FIRST)
            found.append(said.choices[0].message.content)
        except openai.RateLimitError as error:
            found.append(error.status_code)
            refused.release()

    monkeypatch.setattr(writing._Stream, "put", put)
    threads = [threading.Thread(target=ask, args=[server.client()]) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert all(refused.acquire(timeout=60) for _ in range(2))
    held.set()
    for thread in threads:
        thread.join(60)
    assert sorted(map(str, found)) == sorted(["429", "429", text, text])


def test_a_request_has_limited_time_and_size(
    run: Run, client: openai.OpenAI, serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    request, _ = long_request(client)
    server = serve(run.directory, Limits(body=2000, seconds=0.5))
    url = "/v1/chat/completions"
    large = {"model": "assistant", "messages": [{"role": "user", "content": "x" * 3000}]}
    assert server.http.post(url, json=large).status_code == 413
    parts = iter([json.dumps(large).encode()])  # sent in chunks, without its length
    chunked = server.http.post(url, content=parts, headers={"content-type": "application/json"})
    assert (chunked.status_code, chunked.json()["error"]["code"]) == (413, "request_too_large")
    slow(monkeypatch, 0.1)
    said = server.http.post(url, json=request)
    assert (said.status_code, said.json()["error"]["code"]) == (504, "timeout")
    with pytest.raises(openai.APIError, match=r"longer than 0\.5 seconds"):
        list(server.client().chat.completions.create(**request, stream=True))


def test_a_key_is_asked_for(run: Run, serve: Callable[..., Any]) -> None:
    server = serve(run.directory, api_key="secret", hosts=None)
    asked: Any = {"model": "assistant", "messages": FIRST, "max_tokens": 1}
    assert server.client(api_key="secret").chat.completions.create(**asked).choices
    for wrong in ("secre", "secret2", "Secret", "none"):
        with pytest.raises(openai.AuthenticationError) as refused:
            server.client(api_key=wrong).chat.completions.create(**asked)
        assert refused.value.code == "invalid_api_key"
    for url in ("/v1/models", "/v1/models/assistant"):
        assert server.http.get(url).status_code == 401
    assert server.http.get("/health").status_code == 200


def test_an_error_in_the_program_is_logged_and_not_told(
    run: Run, serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(run.directory)

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("private")

    monkeypatch.setattr("fedcustom.api.Run.prompt", broken)
    said = server.http.post("/v1/chat/completions", json={"model": "assistant", "messages": FIRST})
    assert said.status_code == 500
    assert "private" not in said.text
    assert "ZeroDivisionError: private" in server.log[0]


def test_a_model_is_not_served_before_its_run_is_finished(run: Run, tmp_path: Path, command: Any) -> None:
    (tmp_path / "recipe.toml").write_text((run.directory / "recipe.toml").read_text())
    said = command("serve", tmp_path)
    assert said.code == 2
    assert "the run is not finished" in said.error
    assert len(said.error.strip().splitlines()) == 1
