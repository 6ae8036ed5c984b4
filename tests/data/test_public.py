"""The public unlabelled set: where it comes from, and that it never holds what is measured."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcustom.core.errors import DataError
from fedcustom.data.build import build_data
from fedcustom.data.public import set_aside
from fedcustom.data.settings import ClientSettings, DataSettings, PublicSettings
from fedcustom.recipe.recipe import load_recipe
from fedcustom.transport.client_store import folder_name
from helpers.rows import make_rows, write_jsonl

CLIENTS = ClientSettings(partition="iid", count=4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{**row, "text": f"{row['text']} {number}"} for number, row in enumerate(make_rows(120, 0))]
    write_jsonl(tmp_path / "train.jsonl", rows[:80])
    write_jsonl(tmp_path / "test.jsonl", rows[80:100])
    write_jsonl(tmp_path / "public.jsonl", [{"body": row["text"]} for row in rows[100:]])
    return tmp_path


def test_a_file_of_texts(folder: Path) -> None:
    data = DataSettings(source=str(folder), test="test")
    public = PublicSettings(source=str(folder), split="public", text="{body}", limit=15)
    built = build_data(data, CLIENTS, 0, public)
    assert len(built.public) == 15
    assert all(example.label == -1 and example.target == "" for example in built.public)
    assert [e.text for e in built.public] == [e.text for e in build_data(data, CLIENTS, 0, public).public]


def test_a_fraction_leaves_the_clients(folder: Path) -> None:
    data = DataSettings(source=str(folder), test="test")
    built = build_data(data, CLIENTS, 0, PublicSettings(fraction=0.25))
    private = [e.text for c in built.clients.values() for e in [*c.train, *c.development, *c.test]]
    public = [e.text for e in built.public]
    assert len(public) == 20
    assert len(private) == 60
    assert not set(public) & set(private)


@given(st.integers(1, 200), st.floats(0, 0.99), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_setting_aside_is_a_split(count: int, fraction: float, seed: int) -> None:
    private, public = set_aside(count, fraction, [seed])
    assert sorted([*private, *public]) == list(range(count))
    assert len(public) == int(fraction * count)


def test_bad_public_sets(folder: Path) -> None:
    data = DataSettings(source=str(folder), test="test")

    def build(**settings: object) -> None:
        build_data(data, CLIENTS, 0, PublicSettings(source=str(folder), **settings))  # type: ignore[arg-type]

    with pytest.raises(DataError, match=r"public.*'text'.*body"):
        build(split="public")
    with pytest.raises(
        DataError, match=r"20 of its 20 texts are test or development inputs, the first in row 1"
    ):
        build(split="test")
    with pytest.raises(DataError, match="no file for split 'nothing'"):
        build(split="nothing")
    write_jsonl(folder / "public.jsonl", [{"body": "a"}, {"body": ""}])
    with pytest.raises(DataError, match="line 2: column 'body' is empty"):
        build(split="public", text="{body}")


def test_source_and_fraction_exclude_each_other() -> None:
    with pytest.raises(Exception, match="exclude each other"):
        load_recipe({"public": {"source": "a", "fraction": 0.1}})


@given(st.text(max_size=80))
@settings(max_examples=50, deadline=None)
def test_folder_names_are_plain(name: str) -> None:
    found = folder_name(name)
    assert found not in ("", ".", "..")
    assert "/" not in found
    assert found == name or found.rpartition("-")[2].isalnum()
