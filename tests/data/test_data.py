"""Sources, templates, splits and tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcustom.core.errors import DataError
from fedcustom.data.build import build_data
from fedcustom.data.examples import Example, LearningTask, make_examples
from fedcustom.data.files import read_file
from fedcustom.data.party_data import read_own
from fedcustom.data.settings import ClientSettings, DataSettings, PublicSettings
from fedcustom.data.sources import read_rows
from fedcustom.data.tokens import (
    IGNORED,
    TokenizedExample,
    by_length,
    collate,
    example_order,
    packed,
    tokenize,
)
from fedcustom.deployment.local import write_parts
from helpers.rows import make_rows, write_jsonl
from helpers.tiny_models import tiny_tokenizer


def source(path: Path | str, **more: Any) -> DataSettings:
    return DataSettings(source=str(path), **more)


def iid(count: int = 4, **more: Any) -> ClientSettings:
    return ClientSettings(partition="iid", count=count, **more)


# --- reading ---


def test_all_kinds_of_files_give_the_same_rows(tmp_path: Path) -> None:
    rows = [{"text": "a, b", "label": "x"}, {"text": 'say "c"\nand d', "label": "y"}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pd.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False)
    pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet", index=False)
    for ending in ("jsonl", "json", "csv", "parquet"):
        assert read_file(tmp_path / f"a.{ending}") == rows, ending


def test_splits_are_found_in_a_folder(data_folder: Path) -> None:
    assert len(read_rows(source(data_folder), "train")) == 160
    assert len(read_rows(source(data_folder), "test.jsonl")) == 40
    with pytest.raises(DataError, match=r"no file for split 'tests'; allowed: .*did you mean 'test'"):
        read_rows(source(data_folder), "tests")


def test_a_saved_hub_data_set(tmp_path: Path) -> None:
    import datasets

    label = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    made = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "saved")
    rows = read_rows(source(tmp_path / "saved"), "train")
    assert rows == [{"text": "a", "label": "yes"}, {"text": "b", "label": "no"}]
    with pytest.raises(DataError, match="no split 'test'"):
        read_rows(source(tmp_path / "saved"), "test")


def test_one_data_set_that_was_saved(tmp_path: Path) -> None:
    """``Dataset.save_to_disk`` writes no list of splits; a test set is another folder beside it."""
    import datasets

    for name, texts in (("fit", ["a", "b"]), ("exam", ["c"])):
        datasets.Dataset.from_dict({"text": texts, "label": texts}).save_to_disk(tmp_path / name)
    write_jsonl(tmp_path / "more.jsonl", [{"text": "d", "label": "a"}])
    for where, train in ((tmp_path / "fit", "train"), (tmp_path, "fit")):
        assert [row["text"] for row in read_rows(source(where, train=train), train)] == ["a", "b"]
        assert [row["text"] for row in read_rows(source(where), "exam")] == ["c"]
        assert [row["text"] for row in read_rows(source(where), "more")] == ["d"]
        with pytest.raises(DataError, match=r"no file for split 'exams'; .*did you mean 'exam'"):
            read_rows(source(where), "exams")
    (tmp_path / "fit" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="fit: cannot be read as a saved data set"):
        read_rows(source(tmp_path / "fit"), "train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', r"bad.jsonl, line 2: not JSON"),
        ("list.jsonl", b"[1, 2]\n", r"list.jsonl, line 1: must be a JSON object, not list"),
        ("bad.json", b'[{"a": 1},\n {"a" 2}]', r"bad.json, line 2: not JSON"),
        ("latin.jsonl", b'{"text": "\xe9"}\n', r"latin.jsonl: not UTF-8"),
        ("bad.parquet", b"PAR1 is not one", r"bad.parquet: cannot be read as PARQUET"),
        ("empty.jsonl", b"\n\n", r"split 'train' is empty"),
        ("notes.doc", b"hello", r"unknown kind of file; allowed: .jsonl"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(source(tmp_path / name), "train")


def test_names_that_lead_nowhere() -> None:
    with pytest.raises(DataError, match="no built-in data 'builtin:docstring'"):
        read_rows(source("builtin:docstring"), "train")
    with pytest.raises(DataError, match="no such file or folder"):
        read_rows(source("./nowhere.jsonl"), "train")
    with pytest.raises(DataError, match="no file or folder here, and the hub does not give it"):
        read_rows(source("nobody/nothing"), "train")


# --- building ---


def all_texts(clients: Any, part: str) -> list[str]:
    return [example.text for client in clients.values() for example in getattr(client, part)]


@given(
    st.integers(12, 60),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.1, 0.3]),
    st.sampled_from([0.0, 0.2, 0.4]),
    st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_each_row_is_used_once(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    count: int,
    development: float,
    test: float,
    seed: int,
) -> None:
    made = [{"text": f"row {i}", "label": "ab"[i % 2]} for i in range(rows)]
    path = write_jsonl(tmp_path_factory.mktemp("rows") / "train.jsonl", made)
    clients = iid(count, development_fraction=development, test_fraction=test)
    data = build_data(source(path), clients, seed)
    texts = [text for part in ("train", "development", "test") for text in all_texts(data.clients, part)]
    assert sorted(texts) == sorted(row["text"] for row in made)
    for client in data.clients.values():
        assert client.train
        assert bool(client.development) == (development > 0)
        assert bool(client.test) == (test > 0)


def test_columns_become_examples(tmp_path: Path) -> None:
    rows = [{"q": f"what {i}", "c": f"ctx {i}", "kind": [10, 2][i % 2]} for i in range(12)]
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    data = build_data(
        source(path, text="{c}: {q}", label="kind"), iid(1, test_fraction=0, development_fraction=0), 0
    )
    assert data.task == LearningTask("classification", ("2", "10"))  # numbers sort as numbers
    by_text = {example.text: data.task.labels[example.label] for example in data.clients["client-0"].train}
    assert by_text["ctx 3: what 3"] == "2"
    assert by_text["ctx 4: what 4"] == "10"


def test_references_are_kept_for_scoring(data_folder: Path) -> None:
    settings_ = source(
        data_folder,
        task="generation",
        prompt="{source} :",
        target=" {target}",
        references="references",
        test="test",
    )
    data = build_data(settings_, iid(2), 0)
    row = make_rows(40, 2)[0]
    example = data.test[0]
    assert example.text == f"{row['source']} :"
    assert example.references == tuple(row["references"])
    assert example.target == f" {row['references'][0]}"  # as the model learns to write it
    trained = data.clients["client-0"].train[0]
    assert trained.target.startswith(" the ")
    assert trained.target.strip() in trained.references
    own = {"source": "a", "target": "a second way", "references": ["first", "a second way"]}
    given, *others = make_examples(
        [own, {**own, "target": ""}, {k: v for k, v in own.items() if k != "target"}],
        settings_, (), scoring=True, where="test",
    )  # fmt: skip
    assert given.target == " a second way"  # a row's own target comes before its references
    assert [other.target for other in others] == [" first", " first"]


@pytest.mark.parametrize("references", ["references", None])
def test_what_a_local_site_reads_is_what_the_simulation_has(
    data_folder: Path, tmp_path: Path, references: str | None
) -> None:
    settings_ = source(
        data_folder, task="generation", prompt="{source} :", target=" {target}", references=references
    )
    data = build_data(settings_, ClientSettings(partition="iid", count=2, test_fraction=0.3), 0)
    for number, (name, client) in enumerate(data.clients.items()):
        parts = {"train": client.train, "development": client.development, "test": client.test}
        own = write_parts(tmp_path / name, parts, data)
        read = read_own(own, tmp_path / name, settings_, PublicSettings())
        found = read.client(name, number, (), ClientSettings(), 0)
        assert (found.train, found.development, found.test) == tuple(parts.values())


def test_a_test_split_that_names_clients_gives_them_their_own(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", make_rows(40, 0))
    write_jsonl(tmp_path / "test.jsonl", make_rows(12, 1))
    data = build_data(source(tmp_path, test="test"), ClientSettings(partition="natural", column="site"), 0)
    assert [len(client.test) for client in data.clients.values()] == [3, 3, 3, 3]
    assert [len(client.train) + len(client.development) for client in data.clients.values()] == [
        10,
        10,
        10,
        10,
    ]


def test_limits_draw_the_same_rows_again(data_folder: Path) -> None:
    settings_ = source(data_folder, limit=50, test="test", test_limit=10)
    first, second = (build_data(settings_, iid(2, limit=20), 3) for _ in range(2))
    assert first == second
    assert len(first.test) == 10
    assert all(len(c.train) + len(c.development) + len(c.test) == 20 for c in first.clients.values())
    assert build_data(settings_, iid(2, limit=20), 4) != first


@pytest.mark.parametrize(
    ("data", "clients", "message"),
    [
        ({"label": "lable"}, {}, r"no column 'lable'; allowed: text, label, .*did you mean 'label'"),
        ({"text": "{txt}"}, {}, r"no column 'txt'.*did you mean 'text'"),
        ({}, {"partition": "natural", "column": "sight"}, r"no column 'sight'.*did you mean 'site'"),
        ({}, {"partition": "natural", "column": None}, "clients.column: name the column"),
    ],
)
def test_settings_that_do_not_fit_the_rows(
    data_folder: Path, data: dict[str, Any], clients: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        build_data(
            source(data_folder, **data), ClientSettings(**{"partition": "iid", "count": 4, **clients}), 0
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": None}, r"train, line 8: column 'label' is empty"),
        ({"text": ""}, r"train, line 8: column 'text' is empty"),
        ({"site": " "}, r"train, line 8: column 'site' is blank; it names no client"),
    ],
)
def test_empty_values_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    rows = make_rows(20, 0)
    rows[7] |= change
    with pytest.raises(DataError, match=message):
        build_data(
            source(write_jsonl(tmp_path / "train.jsonl", rows)),
            ClientSettings(partition="natural", column="site"),
            0,
        )


def test_a_label_that_only_the_test_has(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", make_rows(20, 0))
    write_jsonl(tmp_path / "test.jsonl", [{"text": "x", "label": "mineral"}])
    with pytest.raises(DataError, match=r"test, line 1: label 'mineral' is not among the training labels"):
        build_data(source(tmp_path, test="test"), iid(2), 0)


# --- tokens ---


def test_decoder_learns_targets_alone() -> None:
    tokenizer = tiny_tokenizer()
    task = LearningTask("generation")
    examples = [Example("the cat :", target=" a dog"), Example("the :", target=" a")]
    settings_ = source("x", task="generation")
    tokens = tokenize(examples, tokenizer, task, settings_, sequence_to_sequence=False)
    batch = collate(tokens, tokenizer.pad_token_id, task, sequence_to_sequence=False)
    for row, example in enumerate(examples):
        wanted = batch["labels"][row][batch["labels"][row] != IGNORED].tolist()
        assert wanted == [*tokenizer(example.target)["input_ids"], tokenizer.eos_token_id]
        shown = batch["input_ids"][row][batch["attention_mask"][row] == 1].tolist()
        assert tokenizer.decode(shown) == f"{example.text}{example.target}{tokenizer.eos_token}"


def test_lengths_are_cut() -> None:
    tokenizer = tiny_tokenizer()
    settings_ = source("x", task="generation", max_length=5, max_target_length=4)
    examples = [Example("the old cat near a small house", target=" the old dog likes bread and rice")]
    (tokens,) = tokenize(
        examples, tokenizer, LearningTask("generation"), settings_, sequence_to_sequence=False
    )
    assert len(tokens.source) == 5
    # A prompt keeps its end; a target that is cut must not teach the model to end in mid-sentence.
    assert tokens.source.tolist() == tokenizer(examples[0].text)["input_ids"][-5:]
    assert tokens.target.tolist() == tokenizer(examples[0].target)["input_ids"][:4]


@given(st.integers(1, 30), st.integers(0, 80), st.integers(0, 80))
@settings(max_examples=60, deadline=None)
def test_the_stream_is_one_permutation_after_the_other(count: int, start: int, more: int) -> None:
    whole = example_order(count, 0, start + more, [1, 2])
    assert example_order(count, start, start + more, [1, 2]) == whole[start:]
    for begin in range(0, start + more - count + 1, count):
        assert sorted(whole[begin : begin + count]) == list(range(count))


def test_batches_by_length_hold_everything_once() -> None:
    tokenizer = tiny_tokenizer()
    examples = [Example(" ".join(["cat"] * (1 + i * 7 % 13)), label=0) for i in range(50)]
    task = LearningTask("classification", ("a", "b"))
    tokens = tokenize(examples, tokenizer, task, source("x"), sequence_to_sequence=False)
    batches = list(by_length(tokens, 8))
    assert sorted(i for batch in batches for i in batch) == list(range(50))
    lengths = [len(tokens[i].source) for batch in batches for i in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1]


@given(st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=5), st.lists(st.integers(0, 9), max_size=3))))
def test_ids_in_a_file_are_the_same(rows: list[tuple[list[int], list[int]]]) -> None:
    examples = [TokenizedExample.of(source, target, n) for n, (source, target) in enumerate(rows)]
    mapped = packed(list(examples), in_memory=0)
    for one, other in zip(examples, mapped, strict=True):
        assert one.source.tolist() == other.source.tolist()
        assert one.target.tolist() == other.target.tolist()
        assert (one.label, other.source.dtype) == (other.label, np.int32)
        assert type(other.source) is np.ndarray


def test_what_is_in_a_file_takes_no_memory_of_its_own() -> None:
    row = np.arange(1000, dtype=np.int32)
    mapped = packed([TokenizedExample(row, row[:0], 0)] * 50, in_memory=100_000)
    bases = {id(example.source.base) for example in mapped}
    assert len(bases) == 1
    assert packed(mapped[:2], in_memory=100_000) == mapped[:2]
