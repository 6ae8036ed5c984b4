"""Recipes proposed from small files: what is read off them, what is refused, and that they run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedcustom
from fedcustom.core.errors import DataError, FedcustomError, RecipeError
from fedcustom.proposal import Choices, Question, propose
from fedcustom.proposal.base import CHAT_MEMORY, DECODER_MEMORY, fitting_base
from fedcustom.proposal.columns import profile
from fedcustom.proposal.write import write_proposal
from fedcustom.recipe.recipe import Recipe, load_recipe
from helpers.tables import phrase, table, turns, write_table

STARS, SITES = ("good", "bad", "fair"), ("north", "south")

REVIEWS: dict[str, Callable[..., Any]] = {
    "id": lambda n, d: f"r{n:04d}",
    "review": lambda n, d: phrase(d),
    "sentiment": lambda n, d: STARS[n % 3],
    "hospital": lambda n, d: SITES[n % 2],
    "visited": lambda n, d: f"2024-03-{n % 28 + 1:02d}",
    "score": lambda n, d: round(d.random(), 4),
}


def written(source: Path, folder: Path, **choices: Any) -> Recipe:
    """The recipe that is proposed for a file, as it is read again from the file that it was written to."""
    out = folder / "recipe.toml"
    write_proposal(propose(str(source), Choices(**choices)), out)
    return load_recipe(out)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_reviews(tmp_path: Path, tiny: dict[str, str], ending: str) -> None:
    source = write_table(tmp_path / f"reviews.{ending}", table(48, **REVIEWS))
    recipe = written(source, tmp_path, base=tiny["bert"])
    assert (recipe.data.task, recipe.data.text, recipe.data.label) == (
        "classification",
        "{review}",
        "sentiment",
    )
    assert (recipe.clients.partition, recipe.clients.column) == ("natural", "hospital")
    assert recipe.data.source == str(source)
    assert recipe.data.max_length <= 64


def test_kinds_of_columns() -> None:
    rows = table(
        40, **REVIEWS, empty=lambda n, d: None, same=lambda n, d: "x", stars=lambda n, d: n % 5,
        chat=lambda n, d: turns(d), things=lambda n, d: ["a"], gaps=lambda n, d: "" if n == 7 else phrase(d),
    )  # fmt: skip
    found = profile(rows)
    assert {name: column.kind for name, column in found.items()} == {
        "id": "identifier", "review": "text", "sentiment": "category", "hospital": "category",
        "visited": "date", "score": "number", "empty": "empty", "same": "constant", "stars": "category",
        "chat": "messages", "things": "container", "gaps": "text",
    }  # fmt: skip
    assert found["gaps"].problem == "is empty in 1 of 40 rows (the first: row 8)"


TASKS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "generation": (
        table(30, question=lambda n, d: phrase(d), answer=lambda n, d: phrase(d)),
        {"prompt": "{question}\n", "target": "{answer}"},
    ),
    "chat": (table(30, messages=lambda n, d: turns(d), user=lambda n, d: SITES[n % 2]), {"messages": None}),
    "preference": (
        table(
            30, prompt=lambda n, d: phrase(d), chosen=lambda n, d: phrase(d), rejected=lambda n, d: phrase(d)
        ),
        {"chosen": None},
    ),
    "retrieval": (
        table(30, query=lambda n, d: phrase(d), passage=lambda n, d: phrase(d, 20, 40)),
        {"prompt": "{query}", "target": "{passage}"},
    ),
    "classification": (
        table(30, text=lambda n, d: phrase(d), label=lambda n, d: n % 2),
        {"text": "{text}", "label": "label"},
    ),
}


@pytest.mark.parametrize(
    "task", [pytest.param(task, marks=[pytest.mark.slow] * (task == "retrieval")) for task in TASKS]
)
def test_each_task_runs(task: str, tmp_path: Path) -> None:
    """One round of what is proposed, on the smallest built-in models."""
    rows, settings = TASKS[task]
    source = write_table(tmp_path / "rows.jsonl", rows)
    writes = task in ("generation", "chat", "preference")
    recipe = written(source, tmp_path, base="builtin:lm-small" if writes else None)
    assert recipe.data.task == task
    for key, value in settings.items():
        assert getattr(recipe.data, key) == value
    short: dict[str, Any] = {"rounds.count": 1}
    if writes:
        short |= {"training.local_steps": 1}
    if recipe.data.texts_are_scored:
        short |= {"evaluation.generate_limit": 1, "evaluation.max_new_tokens": 4}
    run = fedcustom.run(tmp_path / "recipe.toml", short, out=tmp_path / "run")
    assert run.summary["metrics"]


@pytest.mark.parametrize(
    ("columns", "task", "prompt"),
    [
        (("prompt", "completion"), "chat", "{prompt}"),
        (("instruction", "output"), "chat", "{instruction}"),
        (("source", "target"), "generation", "{source}\n"),
        (("article", "summary"), "generation", "{article}\n"),
        (("Question", "Answer"), "generation", "{Question}\n"),
        (("context", "question", "answer"), "generation", "{context}\n{question}\n"),
    ],
)
def test_names_of_prompts_and_targets(
    columns: tuple[str, ...], task: str, prompt: str, tmp_path: Path
) -> None:
    cells: dict[str, Callable[..., Any]] = dict.fromkeys(columns, lambda n, d: phrase(d))
    source = write_table(tmp_path / "rows.jsonl", table(20, **cells))
    found = propose(str(source), Choices(base="builtin:lm-small")).recipe()
    assert (found.data.task, found.data.prompt) == (task, prompt)
    assert found.clients.partition == "iid"


def test_standing_of_names(tmp_path: Path, tiny: dict[str, str]) -> None:
    """``label`` before ``fine_label``; a pair of names before a column that may be something else."""
    rows = table(24, text=lambda n, d: phrase(d), fine_label=lambda n, d: n % 4, label=lambda n, d: n % 2)
    found = propose(str(write_table(tmp_path / "a.jsonl", rows)), Choices(base=tiny["bert"])).recipe()
    assert (found.data.task, found.data.label) == ("classification", "label")
    rows = table(
        24, instruction=lambda n, d: phrase(d), response=lambda n, d: phrase(d), category=lambda n, d: n % 2
    )
    found = propose(str(write_table(tmp_path / "b.jsonl", rows)), Choices(base="builtin:lm-small")).recipe()
    assert found.data.task == "chat"


def test_an_instruction_with_gaps_in_its_input(tmp_path: Path) -> None:
    rows = table(
        20, instruction=lambda n, d: phrase(d), input=lambda n, d: phrase(d) if n % 2 else "",
        output=lambda n, d: phrase(d),
    )  # fmt: skip
    found = propose(str(write_table(tmp_path / "a.jsonl", rows)), Choices(base="builtin:lm-small"))
    assert found.recipe().data.prompt == "{instruction}"
    assert any("'input' is empty in 10 of 20 rows" in note for note in found.notes)


TEXT: dict[str, Callable[..., Any]] = {"text": lambda n, d: phrase(d)}
REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "unlabelled": (table(20, **TEXT), "no column looks like a label"),
    "identifiers": (table(20, **TEXT, label=lambda n, d: f"id{n}"), "another value in each of 20 rows"),
    "decimal numbers": (table(20, **TEXT, label=lambda n, d: (n // 2) / 7), "holds numbers"),
    "dates": (table(20, **TEXT, label=lambda n, d: f"2024-01-{n // 2 + 1:02d}"), "too many"),
    "free texts": (table(20, **TEXT, label=lambda n, d: phrase(d)), "another value in each"),
    "one label": (table(20, **TEXT, label=lambda n, d: "x"), "has one value only"),
    "one row": (table(1, **TEXT, label=lambda n, d: n), "has 1 row; at least 6"),
    "gaps in the label": (
        table(20, **TEXT, label=lambda n, d: "" if n == 4 else n % 2),
        "'label' is empty in 1 of 20 rows (the first: line 5)",
    ),
    "gaps in the text": (
        table(20, text=lambda n, d: "" if n == 4 else phrase(d), label=lambda n, d: n % 2),
        "is empty in 1 of 20 rows (the first: line 5)",
    ),
    "two labels": (
        table(20, **TEXT, sentiment=lambda n, d: n % 2, topic=lambda n, d: n % 3),
        "2 columns may be the label; pass --label (one of: sentiment, topic)",
    ),
    "two texts": (
        table(20, one=lambda n, d: phrase(d), two=lambda n, d: phrase(d), label=lambda n, d: n % 2),
        "2 columns hold texts; pass --text",
    ),
    "two owners": (
        table(
            24, **TEXT, label=lambda n, d: n % 2, hospital=lambda n, d: n % 3, ward=lambda n, d: f"w{n % 4}"
        ),
        "2 columns may say whose a row is; pass --client",
    ),
    "two tasks": (
        table(20, question=lambda n, d: phrase(d), answer=lambda n, d: phrase(d), label=lambda n, d: n % 2),
        "can be read as generation",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_it_cannot_tell(case: str, tmp_path: Path, tiny: dict[str, str]) -> None:
    rows, message = REFUSED[case]
    source = write_table(tmp_path / "rows.jsonl", rows)
    with pytest.raises(FedcustomError) as error:
        propose(str(source), Choices(base=tiny["bert"]))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"text,label\n", "is empty"),
        (b"text,label\n\xff\xfe,1\n", "not UTF-8 text"),
        (b"text,text\na,b\n", "two columns are named 'text'"),
    ],
)
def test_files_that_cannot_be_read(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        propose(str(tmp_path / "a.csv"))


def test_folders(tmp_path: Path, tiny: dict[str, str]) -> None:
    rows = table(24, **TEXT, label=lambda n, d: n % 2)
    for name in ("train", "validation", "test", "extra"):
        write_table(tmp_path / f"{name}.jsonl", rows)
    found = propose(str(tmp_path), Choices(base=tiny["bert"]))
    data = found.recipe().data
    assert (data.train, data.development, data.test) == ("train", "validation", "test")
    assert "splits that are not used: extra" in found.notes
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "a.txt").write_text("A document.")
    with pytest.raises(DataError, match="holds 1 documents and no rows"):
        propose(str(documents))
    write_table(documents / "one.jsonl", rows)
    write_table(documents / "two.jsonl", rows)
    with pytest.raises(DataError, match="no split is named 'train'; name one by --train"):
        propose(str(documents))
    assert propose(str(documents), Choices(train="two", base=tiny["bert"])).recipe().data.train == "two"
    with pytest.raises(DataError, match="no such file or folder"):
        propose(str(tmp_path / "gone.csv"))


def test_choices_win_and_are_checked(tmp_path: Path, tiny: dict[str, str]) -> None:
    source = str(write_table(tmp_path / "reviews.csv", table(48, **REVIEWS)))
    found = propose(
        source, Choices(label="hospital", text="Said: {review}", client="none", base=tiny["bert"])
    )
    recipe = found.recipe()
    assert (recipe.data.label, recipe.data.text) == ("hospital", "Said: {review}")
    assert (recipe.clients.partition, recipe.clients.count) == ("iid", 2)
    for choices, message in (
        ({"label": "sentimen"}, "did you mean 'sentiment'"),
        ({"task": "ranking"}, "--task ranking; allowed"),
        ({"text": "{body}"}, "no column 'body'"),
        ({"label": "id"}, "another value in each of 48 rows"),
        ({"train": "test"}, "no such split"),
    ):
        with pytest.raises(DataError, match=message):
            propose(source, Choices(base=tiny["bert"], **choices))


def test_every_question_has_its_option(tmp_path: Path, tiny: dict[str, str]) -> None:
    """Whoever answers is asked for all that was not decided beforehand, and can answer otherwise."""
    source = write_table(tmp_path / "reviews.csv", table(48, **REVIEWS))
    asked = list[str]()

    def decide(question: Question) -> str:
        asked.append(question.option)
        assert question.option in Choices.__dataclass_fields__
        return tiny["bert"] if question.option == "base" else str(question.proposal)

    propose(str(source), decide=decide)
    assert asked == ["task", "base", "label", "text", "client"]


def test_nothing_is_overwritten_or_half_written(tmp_path: Path, tiny: dict[str, str]) -> None:
    source = write_table(tmp_path / "reviews.csv", table(48, **REVIEWS))
    proposal, out = propose(str(source), Choices(base=tiny["bert"])), tmp_path / "recipe.toml"
    out.write_text("mine")
    with pytest.raises(RecipeError, match="is there already; --force"):
        write_proposal(proposal, out)
    assert out.read_text() == "mine"
    checked = write_proposal(proposal, out, force=True)
    assert checked.clients == 2
    assert sum(checked.rows.values()) == 48
    source.write_text(source.read_text() + "r,,good,north,2024-01-01,0.5\n")  # changed since: it does not run
    with pytest.raises(DataError, match="column 'review' is empty"):
        write_proposal(proposal, tmp_path / "other.toml")
    assert not (tmp_path / "other.toml").exists()


def test_long_conversations_are_left_out(tmp_path: Path) -> None:
    rows = table(30, messages=lambda n, d: turns(d))
    rows[3]["messages"][2]["content"] = " ".join(["room"] * 700)
    source = write_table(tmp_path / "c.jsonl", rows)
    recipe = written(source, tmp_path, base="builtin:lm-small")
    assert recipe.data.too_long == "leave-out"
    assert recipe.data.max_length + recipe.data.max_target_length <= 512
    assert json.loads(source.read_text().splitlines()[3])["messages"][2]["content"].startswith("room")


def test_a_base_that_fits_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fitting_base("classification", 0)[0] == "builtin:minilm"
    monkeypatch.setattr("fedcustom.proposal.base.smollm2.check_present", lambda: None)
    assert fitting_base("chat", CHAT_MEMORY)[0] == "builtin:smollm2"
    assert fitting_base("chat", CHAT_MEMORY - 1)[0] == "builtin:lm"
    assert fitting_base("generation", DECODER_MEMORY - 1)[0] == "builtin:lm-small"
