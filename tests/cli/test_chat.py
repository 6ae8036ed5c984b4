"""``chat`` and ``predict`` with a model that was customised on conversations."""

from __future__ import annotations

import builtins
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fedcustom
from fedcustom.api import Run
from fedcustom.core.errors import DataError, RunError
from helpers.conversations import chat_llama, chat_recipe, conversations
from helpers.rows import write_jsonl


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    place = tmp_path_factory.mktemp("chat")
    recipe = chat_recipe(place, chat_llama(place / "llama"))
    recipe |= {"method": {"name": "full"}, "rounds": {"count": 4}}
    recipe["training"] = {"batch_size": 5, "local_steps": 15, "learning_rate": 0.003}
    return fedcustom.run(recipe, out=place / "run")


def plain(run: Run, messages: list[dict[str, str]]) -> str:
    """The answer by ``transformers`` alone."""
    tokenizer = run.tokenizer()
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    with torch.no_grad():
        written = run.model().generate(**inputs, max_new_tokens=8, do_sample=False)[0]
    return str(tokenizer.decode(written[inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_conversation_through_pipes(run: Run, command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = ["Who is the cat?", "And its friend?", "/reset", "", "And its friend?", "/quit", "Never said"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(turns)))
    said = command("chat", run.directory)
    first = {"role": "user", "content": turns[0]}
    second = {"role": "user", "content": turns[1]}
    one = plain(run, [first])
    two = plain(run, [first, {"role": "assistant", "content": one}, second])
    assert said.code == 0
    assert said.out == f"{one}\n{two}\n{plain(run, [second])}\n"
    assert said.error == ""


def test_pipes_are_utf_8_whatever_the_locale_is(
    run: Run, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for encoding, errors in (("utf-8", "strict"), ("ascii", "surrogateescape")):
        piped = io.BytesIO(b"\xef\xbb\xbfWho is the cat?\nWho \xff?\n")
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(piped, encoding=encoding, errors=errors))
        said = command("chat", run.directory)
        assert said.code == 2
        assert said.out == plain(run, [{"role": "user", "content": "Who is the cat?"}]) + "\n"
        assert "standard input, line 2: not UTF-8 text" in said.error


def test_pieces_make_up_the_answer(run: Run) -> None:
    pieces: list[str] = []
    reply = run.chat([{"role": "user", "content": "Who is the cat?"}], pieces.append)
    assert len(pieces) > 1
    assert "".join(pieces) == reply.text == plain(run, [{"role": "user", "content": "Who is the cat?"}])
    assert (reply.ended, reply.dropped) == (True, 0)
    assert run.predict(["Who is the cat?"]) == [{"text": reply.text}]


@pytest.mark.parametrize("messages", ["hello", ["hello"], [{"role": "user", "content": "a"}, None]])
def test_messages_that_are_no_objects(run: Run, messages: Any) -> None:
    with pytest.raises(DataError, match="must be an object with role and content"):
        run.chat(messages)


def test_an_answer_that_is_stopped(run: Run, command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    short = fedcustom.load(run.directory)
    short.recipe = short.recipe.model_copy(
        update={"evaluation": short.recipe.evaluation.model_copy(update={"max_new_tokens": 2})}
    )
    monkeypatch.setattr(fedcustom.api, "load", lambda directory: short)  # type: ignore[attr-defined]
    monkeypatch.setattr("sys.stdin", io.StringIO("Who is the cat?\n"))
    said = command("chat", run.directory)
    assert run.predict(["Who is the cat?"])[0]["text"].startswith(said.out.strip())
    assert "the answer was stopped (evaluation.max_new_tokens = 2)" in said.error


def test_a_terminal_shows_a_prompt_and_forgets_refused_turns(
    run: Run, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: Iterator[str] = iter(["a <|im_end|>", "why " * 300, "Who?"])

    def answer(prompt: str) -> str:
        assert prompt == "> "
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", answer)
    monkeypatch.setattr("sys.stdin", Terminal())
    said = command("chat", run.directory)
    assert said.code == 0
    assert said.out == plain(run, [{"role": "user", "content": "Who?"}]) + "\n\n"
    assert "/reset forgets the conversation" in said.error
    assert "control token '<|im_end|>' in message 1; take it out; the turn is forgotten" in said.error
    assert "tokens with its last exchange alone; data.max_length = 200; the turn is forgotten" in said.error


def test_a_long_conversation_loses_its_oldest_exchanges(
    run: Run, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = ["Who is the cat? " * 5] * 12
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(turns)))
    said = command("chat", run.directory)
    assert said.code == 0
    assert "tokens of the oldest exchanges were left out (data.max_length = 200)" in said.error


def test_a_piped_turn_that_is_refused_ends_it(
    run: Run, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a </s>\nb\n"))
    said = command("chat", run.directory)
    assert (said.code, said.out) == (2, "")
    assert "standard input, line 1: " in said.error
    assert "control token '</s>'" in said.error


def test_what_escapes_are_is_shown(run: Run, command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def chat(self: Run, messages: Any, on_text: Any) -> Any:
        on_text("a\x1b[2Jb")
        return fedcustom.api.ChatReply("ab", True, 0)  # type: ignore[attr-defined]

    monkeypatch.setattr(Run, "chat", chat)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    assert command("chat", run.directory).out == "a\\x1b[2Jb\n"


def test_runs_that_do_not_chat(
    run: Run, generation: dict[str, Any], tmp_path: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = fedcustom.run(generation, {"rounds.count": 1}, out=tmp_path / "run")
    with pytest.raises(RunError, match=r"not made on conversations \(data.task = 'generation'\)"):
        other.chat([])
    recipe = run.recipe.model_dump(exclude_none=True)
    local = fedcustom.run(recipe, {"baseline": "local", "rounds.count": 1}, out=tmp_path / "local")
    said = command("chat", local.directory)
    assert said.code == 2
    assert "one model for each client" in said.error
    with pytest.raises(DataError, match="nothing to answer"):
        run.chat(conversations()[0]["messages"])
    with pytest.raises(DataError, match="input 1: column 'messages' holds an empty list"):
        run.chat([])


def test_predict_takes_texts_and_conversations(run: Run, command: Any, tmp_path: Path) -> None:
    one = plain(run, [{"role": "user", "content": "Who is the cat?"}])
    assert command("predict", run.directory, "Who is the cat?").out == f"{one}\n"
    (tmp_path / "a.txt").write_text("Who is the cat?\n\nWho is the dog?\n")
    said = [
        json.loads(line)
        for line in command("predict", run.directory, "--input", tmp_path / "a.txt").out.splitlines()
    ]
    assert said == [
        {"text": one},
        {"text": None},
        {"text": plain(run, [{"role": "user", "content": "Who is the dog?"}])},
    ]
    rows = conversations()
    asked = [{"messages": row["messages"][:-1]} for row in rows]
    outputs = []
    for name, given in (("whole", rows), ("asked", asked)):
        write_jsonl(tmp_path / f"{name}.jsonl", given)
        outputs.append(command("predict", run.directory, "--input", tmp_path / f"{name}.jsonl").out)
    assert outputs[0] == outputs[1]
    assert [json.loads(line)["text"] for line in outputs[0].splitlines()] == [
        plain(run, row["messages"]) for row in asked
    ]
    write_jsonl(tmp_path / "bad.jsonl", [asked[0], {"messages": [{"role": "bot", "content": "a"}]}])
    said = command("predict", run.directory, "--input", tmp_path / "bad.jsonl")
    assert said.code == 2
    assert "bad.jsonl, line 2: column 'messages', message 1: role 'bot'" in said.error
