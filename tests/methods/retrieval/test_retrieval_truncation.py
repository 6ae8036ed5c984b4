"""What retrieval cuts: questions by ``data.truncate`` wherever they are embedded, and what a generator has no
room for, by count. Token ids are put together by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fedcustom
from fedcustom import library
from fedcustom.data.build import build_data
from fedcustom.data.encode import AUTOMATIC
from fedcustom.data.examples import ClientData, Example, LearningTask, input_of
from fedcustom.data.truncation import Truncation
from fedcustom.evaluation.settings import EvaluationSettings
from fedcustom.federated.build import make_method
from fedcustom.methods import Client
from fedcustom.methods.retrieval.generation import Generator
from fedcustom.methods.retrieval.messages import CalibrateTask, RouteTask
from fedcustom.methods.retrieval.router import mass_before
from fedcustom.models.load import load_base
from fedcustom.models.settings import ModelSettings
from fedcustom.recipe.recipe import load_recipe

TEMPLATE = "{c} Q:{q}"
CONTEXT = "the old cat near a small house " * 6
LIMIT = 16


def built(recipe: dict[str, Any], **data: Any) -> Any:
    """The recipe's method; none of its clients has such questions yet."""
    checked = load_recipe({**recipe, "data": {**recipe["data"], **data}})
    base = load_base(checked.model, LearningTask("retrieval"), 0, head=False)
    source = {**recipe, "data": {**recipe["data"], "prompt": "{question}"}}
    known = load_recipe(source)
    return make_method(checked, base, build_data(known.data, known.clients, 0, known.public))


def by_hand(base: Any, example: Example, row: dict[str, str], truncate: str) -> list[int]:
    """The tokens that are left of a question."""

    def ids(text: str) -> list[int]:
        return list(base.tokenizer(text, add_special_tokens=False)["input_ids"])

    if truncate == "keep-end":
        return ids(example.text)[-LIMIT:]
    if truncate == "keep-start":
        return ids(example.text)[:LIMIT]
    tail = ids(f" Q:{row['q']}")
    left = ids(row["c"])
    return [
        *(left[len(left) - LIMIT + len(tail) :] if ":keep-end" in truncate else left[: LIMIT - len(tail)]),
        *tail,
    ]


def vector(base: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        states = base.model(input_ids=torch.tensor([ids])).last_hidden_state[0].double()
    return torch.nn.functional.normalize(states.mean(dim=0), dim=0)


@pytest.mark.parametrize("truncate", ["auto", "c", "c:keep-end", "keep-start", "keep-end"])
def test_questions_are_cut_alike_for_routes_and_for_searches(recipe: dict[str, Any], truncate: str) -> None:
    """A context of which the beginning is the same everywhere would give all clients one route."""
    method = built(recipe, prompt=TEMPLATE, truncate=truncate)
    things = ("cat", "bread", "hill", "dog", "house", "town", "river", "bird", "old cat", "small dog")
    table = [{"c": CONTEXT.strip(), "q": f" Is a {what} there?"} for what in things]
    questions = [input_of(TEMPLATE, row, "") for row in table]
    assert all(len(method.base.tokenizer(q.text)["input_ids"]) > 2 * LIMIT for q in questions)
    expected = torch.stack(
        [
            vector(method.base, by_hand(method.base, q, row, truncate))
            for q, row in zip(questions, table, strict=True)
        ]
    )
    assert (len({tuple(row.tolist()) for row in expected}) == 1) == (truncate == "keep-start")
    client = Client("site-0", ClientData("site-0", questions, development=questions))
    routed = method.execute(RouteTask(), client)
    torch.testing.assert_close(routed.tensors["total"].double(), expected.sum(dim=0), atol=1e-5, rtol=0)
    torch.testing.assert_close(routed.tensors["scatter"].double(), expected.T @ expected, atol=1e-5, rtol=0)
    weight = torch.randn(3, expected.shape[1], generator=torch.Generator().manual_seed(0)).double()
    bias = torch.zeros(3, dtype=torch.float64)
    masses = method.execute(CalibrateTask({"weight": weight, "bias": bias}, own=1), client).tensors["masses"]
    logits = expected @ weight.T
    torch.testing.assert_close(
        masses, mass_before(logits, torch.ones(len(things), dtype=torch.long)), atol=1e-4, rtol=0
    )
    known = [Example(q.text, fields=q.fields, target="x") for q in questions]
    scores = method.predict(method.initialise(), known, texts=False).scores
    assert scores.shape == (len(things), 2)
    searched = torch.from_numpy(method.embedder.questions(questions)).double()
    torch.testing.assert_close(searched, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("truncate", "said"),
    [
        ("auto", "those after the first 16"),
        ("keep-start", "those after the first 16"),
        ("keep-end", "those before the last 16"),
        ("auto:keep-end", "those before the last 16"),
        ("question:keep-end", "those before the last 16"),
    ],
)
def test_a_question_that_is_asked_is_cut_by_the_recipe(
    recipe: dict[str, Any], tmp_path: Path, truncate: str, said: str
) -> None:
    recipe["data"]["truncate"] = truncate
    library.index(recipe, tmp_path / "index")
    notes: list[str] = []
    opened = library.Library(tmp_path / "index", note=notes.append)
    base, question = opened.method.base, "the cat near the dog " * 5 + "and the hill"
    ids = base.tokenizer(question)["input_ids"]
    opened.ask(question)
    assert notes == [f"the question has {len(ids)} tokens; {said} (data.max_length) are not looked at"]
    left = ids[-LIMIT:] if "last" in said else ids[:LIMIT]
    found = torch.from_numpy(opened.method.embedder.typed_questions([question])[0]).double()
    torch.testing.assert_close(found, vector(base, left), atol=1e-5, rtol=0)
    notes.clear()
    opened.ask("the cat near the dog")
    assert not notes


# --- the generator ---


def generator(tiny: dict[str, str], how: Truncation = AUTOMATIC) -> Generator:
    """With room for 56 tokens, and 8 of an answer."""
    return Generator(ModelSettings(base=tiny["llama"]), EvaluationSettings(), 8, how)


def test_passages_that_do_not_fit_are_counted(tiny: dict[str, str]) -> None:
    made = generator(tiny)

    def ids(text: str) -> list[int]:
        return list(made.base.tokenizer(text, add_special_tokens=False)["input_ids"])

    passages = [CONTEXT, "the cat", CONTEXT]
    prompt = made.prompt(Example("a cat?"), passages)
    ending = ids("Question: a cat?\nAnswer:")
    each = (56 - len(ending)) // 3
    expected = [[*ids(f"[{n}] {text}")[: each - 2], *ids("\n")] for n, text in enumerate(passages, start=1)]
    assert prompt == [*(token for part in expected for token in part), *ending]
    lost = sum(max(0, len(ids(f"[{n}] {text}")) - each + 2) for n, text in enumerate(passages, start=1))
    assert lost > 0
    assert made.take_cuts() == [
        f"{made.base.name} reads 56 tokens and 8 of an answer; cut were 2 of 3 passages ({lost} tokens)"
    ]
    assert made.take_cuts() == []
    made.prompt(Example("a cat?"), ["the cat"])
    assert made.take_cuts() == []


@pytest.mark.parametrize("truncate", ["auto", "keep-end", "c"])
def test_a_question_that_does_not_fit_a_prompt(tiny: dict[str, str], truncate: str) -> None:
    """It alone is cut, by the recipe, and the words that say what to do stay."""
    made = generator(tiny, Truncation(truncate))
    row = {"c": (CONTEXT * 2).strip(), "q": " Is the cat there?"}
    prompt = made.prompt(input_of(TEMPLATE, row, ""), ["the cat"])
    text = made.base.tokenizer.decode(prompt)
    assert text.endswith("\nAnswer:")
    assert "Question: " in text
    assert "Is the cat there?" in text, "a question behind a long context is never cut"
    assert len(prompt) <= 56
    (said,) = made.take_cuts()
    assert "cut were 1 of 1 questions" in said
    whole = made.base.tokenizer(f"Question: {row['c']} Q:{row['q']}\nAnswer:", add_special_tokens=False)[
        "input_ids"
    ]
    (count,) = [int(word[1:]) for word in said.split() if word.startswith("(")][:1]
    assert len(whole) - count == pytest.approx(56, abs=2), "tokens join where a text was cut"


def test_what_is_cut_for_likelihoods_and_losses(tiny: dict[str, str]) -> None:
    made = generator(tiny)

    def count(text: str) -> int:
        return len(made.base.tokenizer(text, add_special_tokens=False)["input_ids"])

    made.likelihood(Example("a cat?"), [CONTEXT, "the cat"])
    room = 56 - count(" a cat?") - count("\nQuestion:")
    name = f"{made.base.name} reads 56 tokens and 8 of an answer; cut were"
    lost = count(CONTEXT) - room
    expected = [f"{name} 1 of 2 passages ({lost} tokens)"] if lost > 0 else []
    assert made.take_cuts() == expected
    made.likelihood(Example("a cat?"), [CONTEXT * 3])
    assert made.take_cuts() == [f"{name} 1 of 1 passages ({count(CONTEXT * 3) - room} tokens)"]
    answers = ["the old cat sees a small house near the river", "a cat"]
    made.loss([Example("a cat?")] * 2, [[], []], answers)
    over = count(" " + answers[0]) - 8
    assert made.take_cuts() == [f"{name} 1 of 2 reference answers ({over} tokens)"]


def test_what_the_generator_cuts_is_said_of_a_run_and_of_an_answer(
    recipe: dict[str, Any], tmp_path: Path, tiny: dict[str, str]
) -> None:
    recipe["method"] |= {"generator": tiny["llama"], "answer_tokens": 16, "measured_answers": 5}
    run = fedcustom.run(recipe, out=tmp_path / "run")
    warned = (run.directory / "warnings.log").read_text()
    assert "reads 48 tokens and 16 of an answer; cut were " in warned
    assert "reference answers (" in warned
    notes: list[str] = []
    library.ask(run.directory, "the cat near the dog", note=notes.append)
    assert any("passages (" in note for note in notes) == any("reads 48" in note for note in notes)
    assert notes, "three passages and a question take more than 48 tokens"


def test_chunks_are_read_whole(recipe: dict[str, Any], tmp_path: Path) -> None:
    """No chunk of a document is cut where it is embedded; were one, it would be said."""
    notes: list[str] = []
    library.index(recipe, tmp_path / "index", note=notes.append)
    assert not notes
    method = library.Library(tmp_path / "index").method
    method.embedder.chunks(["the cat", CONTEXT])
    lost = len(method.base.tokenizer(CONTEXT)["input_ids"]) - LIMIT
    assert method.take_cuts() == [f"the encoder cut 1 of 2 chunks of documents ({lost} tokens)"]
