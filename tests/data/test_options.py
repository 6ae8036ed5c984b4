"""Options and references of examples: which rows need them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedcustom.core.errors import DataError, RecipeError
from fedcustom.data.build import build_data, check_first_rows
from fedcustom.data.examples import columns, make_examples
from fedcustom.data.settings import ClientSettings, DataSettings
from fedcustom.recipe.recipe import parse_recipe
from helpers.rows import write_jsonl

OPTIONS = ["red", "blue", "green"]


def settings(path: Path, **others: Any) -> DataSettings:
    return DataSettings(source=str(path), task="generation", options="options", **others)


def row(number: int, **others: Any) -> dict[str, Any]:
    return {"source": f"colour {number}", "target": OPTIONS[number % 3], "options": OPTIONS, **others}


def one(given: dict[str, Any], **others: Any) -> Any:
    return make_examples([given], settings(Path("x"), **others), (), scoring=True, where="rows")[0]


def test_the_target_is_one_of_the_options() -> None:
    example = one(row(1))
    assert example.options == tuple(OPTIONS)
    assert example.right_option == 1
    shouted = one(row(2), target=" {target}!")  # options have the form of the target
    assert shouted.options == (" red!", " blue!", " green!")
    assert shouted.right_option == 2
    assert one(row(2, target="green ")).right_option == 2  # space around an answer does not count


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"options": ["red"]}, "two or more different texts"),
        ({"options": "blue"}, "two or more different texts"),
        ({"options": ["blue", "red", " red"]}, "two or more different texts"),
        ({"options": []}, "the list is empty"),
        ({"options": ["blue", None]}, "is empty"),
        ({"options": None}, "must hold a text or a list of texts"),
        ({"target": "grey"}, "the target is none of the 3 texts in column 'options'"),
    ],
)
def test_a_row_without_a_choice_is_refused_with_its_place(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as refused:
        one(row(1, **changed))
    assert str(refused.value).startswith("rows, row 1: ")


def test_training_rows_need_columns_of_scores_where_test_parts_come_out_of_them(tmp_path: Path) -> None:
    split = settings(tmp_path, references="references")
    assert columns(split, scoring=False) == ("source", "target", "references", "options")
    named = split.model_copy(update={"test": "test"})
    assert columns(named, scoring=False) == ("source", "target")
    assert columns(named, scoring=True) == ("source", "references", "options")


def test_clients_test_parts_keep_references(tmp_path: Path) -> None:
    rows = [row(number, references=[f"a {number}", f"b {number}"]) for number in range(12)]
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    clients = ClientSettings(partition="iid", count=2, test_fraction=0.5)
    data = build_data(settings(path, references="references"), clients, 0)
    assert data.test
    for example in data.test:
        number = int(example.text.split()[1])
        assert example.references == (f"a {number}", f"b {number}")
        assert example.target == OPTIONS[number % 3]


def test_training_rows_may_be_without_options_elsewhere(tmp_path: Path) -> None:
    rows = [{"source": f"colour {i}", "target": "grey"} for i in range(6)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "test.jsonl", [row(0), row(1)])
    data = build_data(settings(tmp_path, test="test"), ClientSettings(partition="iid", count=2), 0)
    assert [len(example.options) for example in data.test] == [3, 3]
    assert not any(example.options for client in data.clients.values() for example in client.train)


@pytest.mark.parametrize("key", ["options", "references"])
def test_only_written_answers_have_options(key: str) -> None:
    with pytest.raises(
        RecipeError, match=f"data.{key}: has a meaning for data.task = 'generation' or 'chat' alone"
    ):
        parse_recipe({"data": {key: "column"}}, "recipe")


def test_the_best_round_by_options_needs_some() -> None:
    with pytest.raises(RecipeError, match=r"name the column of options \(data.options\)"):
        parse_recipe({"data": {"task": "generation"}, "evaluation": {"metric": "choice_accuracy"}}, "recipe")


def test_the_first_rows_are_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [row(0), row(1, options=["blue"])])
    with pytest.raises(DataError, match=r"train.jsonl, line 2: column 'options' must hold a list of two"):
        check_first_rows(settings(path), ClientSettings(partition="iid", count=2))
    rows = [row(number, site=["a"]) for number in range(2)]
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    with pytest.raises(DataError, match=r"line 1: column 'site' holds a list"):
        check_first_rows(settings(path), ClientSettings(partition="natural", column="site"))
