"""Demonstrations of in-context learning: cut by ``data.truncate`` as inputs are, and counted where a prompt
has no room for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer.testing

import fedcustom
from fedcustom.cli.app import app
from fedcustom.data.build import build_data
from fedcustom.federated.build import make_method
from fedcustom.methods import Client, Work
from fedcustom.models.load import load_base
from fedcustom.recipe.recipe import load_recipe
from helpers.rows import make_rows, write_jsonl

CONTEXT = "the old cat near a small house likes the bread"
LIMIT = 16
TEMPLATE = "{c} Q:{text}"


@pytest.fixture
def recipe(tiny: dict[str, str], tmp_path: Path) -> Any:
    """Makes recipes whose inputs have a long context before a short question."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, count, seed in (("train", 45, 0), ("test", 10, 2), ("public", 6, 5)):
        found = [
            {
                "c": f"{CONTEXT} {' '.join(row['text'].split()[:3])}",
                "text": f" {row['text'].split()[3]} {name[0]} {n}",
                "label": row["label"],
                "answer": row["label"],
            }
            for n, row in enumerate(make_rows(count, seed))
        ]
        write_jsonl(folder / f"{name}.jsonl", found)

    def make(task: str = "classification", truncate: str = "auto", **changes: Any) -> dict[str, Any]:
        data: dict[str, Any] = {"source": str(folder), "test": "test", "max_length": LIMIT, "task": task}
        if task == "generation":
            data |= {"prompt": TEMPLATE, "target": " {answer}", "max_target_length": 8}
        else:
            data |= {"text": TEMPLATE}
        return {
            "model": {"base": tiny["llama"]},
            "data": {**data, "truncate": truncate},
            "clients": {"partition": "iid", "count": 2},
            "method": {
                "name": "prompt_engineering", "strategy": "in_context", "retriever": tiny["bert"],
                "demonstrations": 1, "shared_demonstrations": 0, "instructions": ["{input} :"],
                "calibrate": False, **changes,
            },
            "public": {"source": str(folder), "split": "public"},
            "rounds": {"count": 1},
            "evaluation": {"batch_size": 16, "max_new_tokens": 4},
        }  # fmt: skip

    return make


def built(recipe: dict[str, Any]) -> tuple[Any, Any]:
    if recipe["data"]["task"] == "generation":
        recipe["method"].pop("calibrate")
    checked = load_recipe(recipe)
    data = build_data(checked.data, checked.clients, checked.seed, checked.public)
    return make_method(checked, load_base(checked.model, data.task, 0, head=False), data), data


def by_hand(tokenizer: Any, text: str, task: str, truncate: str) -> str:
    """What is left of a text, token by token."""

    def ids(part: str) -> list[int]:
        return list(tokenizer(part, add_special_tokens=False)["input_ids"])

    context, mark, question = text.partition(" Q:")
    if truncate in ("keep-start", "keep-end"):
        left = ids(text)[:LIMIT] if truncate == "keep-start" else ids(text)[-LIMIT:]
        return str(tokenizer.decode(left))
    room = LIMIT - len(ids(mark + question))
    assert 0 < room < len(ids(context))
    at_end = truncate == "c:keep-end" or (task == "generation" and ":" not in truncate)
    left = ids(context)[-room:] if at_end else ids(context)[:room]
    return str(tokenizer.decode(left)) + mark + question


def prompts_of(method: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The prompts of each call, as they are put together."""
    seen: list[list[str]] = []
    usual = type(method)._prompts
    monkeypatch.setattr(
        type(method),
        "_prompts",
        lambda self, *given: (seen.append(usual(self, *given)), seen[-1])[1],
    )
    return seen


CASES = [
    (task, truncate)
    for task in ("classification", "generation")
    for truncate in ("auto", "c", "c:keep-end", "c:keep-start", "keep-start", "keep-end")
]


@pytest.mark.parametrize(("task", "truncate"), CASES)
def test_demonstrations_are_cut_as_inputs_are(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, task: str, truncate: str
) -> None:
    method, data = built(recipe(task, truncate))
    seen = prompts_of(method, monkeypatch)
    name, client = next(iter(data.clients.items()))
    state = method.initialise()
    work = method.configure(state, 1, {name: Work()})[name]
    method.execute(work, Client(name, client))
    (prompts,) = seen
    tokenizer = method.base.tokenizer
    own = {by_hand(tokenizer, e.text, task, truncate) for e in client.train}
    queries = [by_hand(tokenizer, e.text, task, truncate) for e in data.public]
    assert state.values["queries"] == queries
    for prompt, query in zip(prompts, queries, strict=True):
        shown, asked = prompt.split("\n\n")
        assert asked == f"{query} :"
        assert shown.rpartition(" :")[0] in own
    vectors = method.retriever.vectors_now(client.train[:3])
    for example, found in zip(client.train, vectors, strict=False):
        left = by_hand(tokenizer, example.text, task, truncate)
        ids = torch.tensor([tokenizer(left)["input_ids"]])  # the retriever's tokenizer is the same
        with torch.no_grad():
            mean = method.retriever.base.model(input_ids=ids).last_hidden_state[0].mean(dim=0)
        np.testing.assert_allclose(found, torch.nn.functional.normalize(mean, dim=0).numpy(), atol=1e-5)


def test_shared_demonstrations_and_the_written_prompt_are_cut_too(recipe: Any, tmp_path: Path) -> None:
    run = fedcustom.run(recipe(), out=tmp_path / "run")
    method, data = built(recipe())
    written = method.prompt(method.open(run.directory / "model"))
    expected = [by_hand(method.base.tokenizer, e.text, "classification", "auto") for e in data.public]
    assert written["queries"] == expected
    assert [row["input"] for row in written["demonstrations"]] == expected
    shown = written["messages"][0]["content"].split("\n\n")[0].rpartition(" :")[0]
    assert shown in expected
    counts = run.summary["truncation"]
    for part, examples in (
        ("public", data.public),
        ("train", [e for client in data.clients.values() for e in client.train]),
    ):
        lengths = [len(method.base.tokenizer(e.text)["input_ids"]) for e in examples]
        assert counts[part]["inputs"] == sum(length > LIMIT for length in lengths) == len(examples)
        assert counts[part]["tokens"] == {"c": sum(length - LIMIT for length in lengths)}


def test_demonstrations_without_room_are_counted(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    method, data = built(recipe(demonstrations=5, shared_demonstrations=2))
    seen = prompts_of(method, monkeypatch)
    name, client = next(iter(data.clients.items()))
    work = method.configure(method.initialise(), 1, {name: Work()})[name]
    method.execute(work, Client(name, client))
    (prompts,) = seen
    shown = sum(prompt.count("\n\n") for prompt in prompts)
    asked = 5 * len(data.public)
    assert 0 < shown < asked
    read, left_out = method.take_cuts()
    assert left_out == (
        f"{asked - shown} of {asked} demonstrations were left out, the farthest of their prompts: "
        f"{method.base.name} has 64 positions"
    )
    texts = [*data.public, *client.train]
    lost = [len(method.base.tokenizer(e.text)["input_ids"]) - LIMIT for e in texts]
    assert read == (
        f"method.retriever reads 16 tokens of a text; cut were {len(texts)} of {len(texts)} texts "
        f"({sum(lost)} tokens)"
    )
    assert method.take_cuts() == []


def test_a_run_says_so_and_so_does_its_use(recipe: Any, tmp_path: Path) -> None:
    run = fedcustom.run(recipe(demonstrations=5), out=tmp_path / "run")
    warned = (run.directory / "warnings.log").read_text()
    assert "demonstrations were left out" in warned
    assert "method.retriever reads 16 tokens" in warned
    given = write_jsonl(tmp_path / "given.jsonl", [{"c": CONTEXT, "text": " bread"}])
    done = typer.testing.CliRunner().invoke(app, ["predict", str(run.directory), "--input", str(given)])
    assert done.exit_code == 0, done.output
    assert "demonstrations were left out" in " ".join(done.output.split())


def test_demonstrations_that_fit_are_not_spoken_of(recipe: Any, tmp_path: Path) -> None:
    wide = recipe()
    wide["data"]["max_length"] = 32
    run = fedcustom.run(wide, out=tmp_path / "run")
    log = run.directory / "warnings.log"
    assert not log.exists() or "left out" not in log.read_text()
