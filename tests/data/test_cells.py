"""Files read directly, and the one text of every cell, whatever kind of file it comes from."""

from __future__ import annotations

import csv
import datetime as dt
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from fedcustom.core.errors import DataError
from fedcustom.data.build import build_data
from fedcustom.data.cells import in_order, text_of
from fedcustom.data.examples import Example, make_examples
from fedcustom.data.files import first_rows, read_file
from fedcustom.data.public import public_examples
from fedcustom.data.settings import ClientSettings, DataSettings, PublicSettings
from fedcustom.data.sources import read_rows
from helpers.rows import write_jsonl

TEXTS = [
    "007", "1.0", "1.50", "1e5", "0x10", "1_000", "NA", "N/A", "null", "None", "nan", "NaN", "-", "True",
    "TRUE", "inf", " padded ", "a, b", 'say "c"', "two\nlines", "cr\r\nlf", "5\" disk", "naïve 東京 👩‍👩‍👧",
    "\u2028", "2020-01-01", "12345678901234567890", "=1+1", "#x", "1,5", "'", ";", "\t", "\u00a0", "\x0b",
    "00",
    "-0",
]  # fmt: skip


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_all(folder: Path, rows: list[dict[str, Any]]) -> list[Path]:
    """The same rows in every kind of file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.json").write_text(json.dumps(rows))
    parquet.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return [
        write_jsonl(folder / "rows.jsonl", rows), write_csv(folder / "rows.csv", rows),
        folder / "rows.json", folder / "rows.parquet",
    ]  # fmt: skip


# --- CSV ---


def test_cells_of_a_csv_file_are_their_texts(tmp_path: Path) -> None:
    rows = [{"text": text, "owner": f"00{number}"} for number, text in enumerate(TEXTS)]
    assert read_file(write_csv(tmp_path / "a.csv", rows)) == rows


@given(
    st.lists(st.lists(st.text(st.characters(codec="utf-8")), min_size=2, max_size=2), min_size=1, max_size=5)
)
@settings(max_examples=60)
def test_what_the_csv_module_writes_is_read(tmp_path_factory: pytest.TempPathFactory, rows: Any) -> None:
    made = [dict(zip(("a", "b"), row, strict=True)) for row in rows]
    path = write_csv(tmp_path_factory.mktemp("csv") / "a.csv", made)
    assert read_file(path) == made


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_marks_and_blank_lines(tmp_path: Path, newline: str, mark: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(mark + newline.join(['"te""xt",label', "", "a,01", "", '"b",02', ""]), newline="")
    rows = read_file(path)
    assert rows == [{'te"xt': "a", "label": "01"}, {'te"xt': "b", "label": "02"}]
    assert [row.place for row in rows] == ["line 3", "line 5"]


def test_a_long_field_and_a_later_column_of_words(tmp_path: Path) -> None:
    rows = [{"text": "x" * 300_000, "n": str(number)} for number in range(3)]
    rows += [{"text": "y", "n": "many"}]
    assert read_file(write_csv(tmp_path / "a.csv", rows)) == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,2\n1,2,3\n", r"a.csv, line 3: 3 fields, but the header names 2 columns"),
        (b"a,b\n1,2,3\n4,5,6\n", r"a.csv, line 2: 3 fields"),
        (b"a,b\n\"x\ny\",1\n1\n", r"a.csv, line 4: 1 fields"),
        (b"a,b\n1,2\n\"open,3\n4,5\n", r"a.csv, line 3: not CSV: unexpected end"),
        (b"a,b\n\"x\"y,2\n", r"a.csv, line 2: not CSV: "),
        (b"a,a\n1,2\n", r"a.csv, line 1: two columns are named 'a'"),
        (b"a,b\n1,2\n1,\xe9\n", r"a.csv: not UTF-8 text \(line 3, byte 11 of the file\)"),
        ("a,b\n1,2\n".encode("utf-16"), r"a.csv: not UTF-8 text \(line 1, byte 1 "),
    ],
)  # fmt: skip
def test_a_malformed_csv_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_file(tmp_path / "a.csv")


def test_the_byte_of_a_fault_far_into_a_file(tmp_path: Path) -> None:
    content = b"text\n" + b"0123456789\n" * 50_000 + b"\xff\n"
    for name in ("a.csv", "a.jsonl"):
        rows = content if name == "a.csv" else b'{"a": 1}\n' * 50_000 + b'"\xff"\n'
        (tmp_path / name).write_bytes(rows)
        fault = rows.index(b"\xff")
        where = rf"line {rows[:fault].count(10) + 1}, byte {fault + 1} of"
        with pytest.raises(DataError, match=where):
            read_file(tmp_path / name)


# --- JSON and Parquet ---


def test_a_byte_order_mark_and_blank_lines_in_json(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": "x\xe2\x80\xa8"}\r\n\n{"b": 2}')
    rows = read_file(tmp_path / "a.jsonl")
    assert rows == [{"a": "x\u2028", "b": None}, {"a": None, "b": 2}]
    assert [row.place for row in rows] == ["line 1", "line 3"]
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf[{"a": 1}]')
    assert read_file(tmp_path / "a.json") == [{"a": 1}]
    (tmp_path / "deep.jsonl").write_text('{"a": ' + "[" * 100_000 + "\n")
    with pytest.raises(DataError, match=r"deep.jsonl, line 1: not JSON"):
        read_file(tmp_path / "deep.jsonl")


def test_class_numbers_of_datasets_have_their_names(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    made = datasets.Dataset.from_dict({"text": list("abcd"), "label": [1, 0, -1, None]}, features=features)
    made.to_parquet(tmp_path / "a.parquet")
    made.save_to_disk(tmp_path / "saved")
    wanted = [("a", "yes"), ("b", "no"), ("c", None), ("d", None)]
    for source in (tmp_path / "a.parquet", tmp_path / "saved"):
        before = sorted(tmp_path.rglob("*"))
        rows = read_rows(DataSettings(source=str(source)), "train")
        assert [(row["text"], row["label"]) for row in rows] == wanted
        assert sorted(tmp_path.rglob("*")) == before  # no copy is kept
        with pytest.raises(DataError, match="row 3: column 'label' is empty"):
            build_data(DataSettings(source=str(source)), ClientSettings(partition="iid", count=1), 0)


def test_narrow_numbers_and_dictionaries_of_parquet(tmp_path: Path) -> None:
    table = pa.table(
        {
            "x": pa.array([0.1, None, 2.5], pa.float32()),
            "c": pa.array(["01", "1", "01"]).dictionary_encode(),
            "d": pa.array([dt.date(2020, 1, 2)] * 3),
        }
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    rows = read_file(tmp_path / "a.parquet")
    assert [text_of(row["x"]) for row in (rows[0], rows[2])] == ["0.1", "2.5"]
    assert [row["c"] for row in rows] == ["01", "1", "01"]
    assert text_of(rows[0]["d"]) == "2020-01-02"


def test_the_first_rows_are_read_without_the_rest(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a\n1\n2\n3,4\n")
    assert first_rows(tmp_path / "a.csv", 2) == [{"a": "1"}, {"a": "2"}]


def test_a_file_replaced_under_the_same_time_is_read_again(tmp_path: Path) -> None:
    import os

    for ending, one, two in (("csv", b"a\n1\n", b"a\n2\n"), ("jsonl", b'{"a": "1"}', b'{"a": "2"}')):
        path = tmp_path / f"a.{ending}"
        for content, text in ((one, "1"), (two, "2")):
            path.write_bytes(content)
            os.utime(path, (1e9, 1e9))
            assert read_file(path) == [{"a": text}]
    for value in ("1", "2"):
        pd.DataFrame({"a": [value]}).to_parquet(tmp_path / "a.parquet")
        os.utime(tmp_path / "a.parquet", (1e9, 1e9))
        assert read_file(tmp_path / "a.parquet") == [{"a": value}]


def test_reading_keeps_no_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    for path in write_all(
        tmp_path / "rows", [{"text": f"a private text {n}", "label": "ab"[n % 2]} for n in range(9)]
    ):
        build_data(DataSettings(source=str(path)), ClientSettings(partition="iid", count=2), 0)
    assert not cache.exists()
    assert len(list((tmp_path / "rows").iterdir())) == 4


# --- from cell to text ---


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("", None), (None, None), (float("nan"), None), (float("inf"), None), (np.float32("nan"), None),
        (pd.NA, None), (pd.NaT, None), ([], None), (["a"], None), ({"a": 1}, None), (b"a", None),
        ((1,), None), (np.array([1]), None), ("a\ud800", None), (Decimal("NaN"), None), (1j, None),
        ({1}, None), (dt.timedelta(1), None),
        (1, "1"), (np.int8(-1), "-1"), (1.0, "1.0"), (np.float64(0.1), "0.1"), (np.float32(0.1), "0.1"),
        (True, "True"), (np.bool_(False), "False"), (10**30, str(10**30)), (Decimal("1.50"), "1.50"),
        (dt.datetime(2020, 1, 2, 3), "2020-01-02 03:00:00"), (np.str_("a"), "a"), (" ", " "),
    ],
    ids=repr,
)  # fmt: skip
def test_the_text_of_a_value(value: object, text: str | None) -> None:
    """The same everywhere: in training, in a public set and in scoring."""
    row = {"text": value, "label": "a", "source": value, "target": "t"}
    rows = [{**row, "text": "b"}, row]
    public = PublicSettings(text="{text}")
    classes, texts = DataSettings(), DataSettings(task="generation")
    if text is None:
        with pytest.raises(ValueError, match=r"^(is|holds) "):
            text_of(value)
        for act in (
            lambda: make_examples(rows, classes, ("a",), scoring=False, where="f"),
            lambda: public_examples(rows, public, classes, "f"),
        ):
            with pytest.raises(DataError, match=r"^f, row 2: column 'text' (is|holds) "):
                act()
        with pytest.raises(DataError, match=r"^f, row 1: column 'source' (is|holds) "):
            make_examples(rows, texts, (), scoring=True, where="f")
        return
    assert text_of(value) == text
    assert make_examples(rows, classes, ("a",), scoring=False, where="f")[1] == Example(text, 0)
    assert public_examples(rows, public, classes, "f")[1].text == text
    assert make_examples(rows[1:], texts, (), scoring=True, where="f")[0].text == text


def test_labels_are_told_apart_by_their_texts(tmp_path: Path) -> None:
    assert in_order(["10", "9", "1", "9"]) == ("1", "9", "10")
    assert in_order(["07", "7", "7.0"]) == ("07", "7", "7.0")
    assert in_order(["1e3", "-2", "5"]) == ("-2", "5", "1e3")
    assert in_order(["10", "9", "x"]) == ("10", "9", "x")
    mixed = [{"text": f"t{n}", "label": [1, "1", 2, "2", "01"][n % 5]} for n in range(20)]
    path = write_jsonl(tmp_path / "a.jsonl", mixed)
    data = build_data(DataSettings(source=str(path)), ClientSettings(partition="iid", count=1), 0)
    assert data.task.labels == ("01", "1", "2")


@pytest.mark.parametrize("column", ["text", "label", "owner"])
@pytest.mark.parametrize("value", [None, float("nan"), ["a"], {"a": 1}, ""])
def test_a_cell_that_is_no_text_is_named_by_file_line_and_column(
    tmp_path: Path, column: str, value: Any
) -> None:
    rows = [{"text": f"t{n}", "label": "ab"[n % 2], "owner": f"o{n % 2}"} for n in range(30)]
    rows[17] |= {column: value}
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows[:5]) + "\n\n")
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows[5:])
    clients = ClientSettings(partition="natural", column="owner")
    for limit in (None, 29):  # where rows are drawn the line is the file's own
        with pytest.raises(DataError, match=rf"a.jsonl, train, line 19: column '{column}' (is|holds) "):
            build_data(DataSettings(source=str(path), limit=limit), clients, 1)


# --- twins ---


@pytest.mark.parametrize(
    "labels", [["007", "7", "1.0"], [10, 9, 1], [True, False], [0.5, 1.0], ["NA", "nan", "None"]]
)
def test_the_same_data_in_every_kind_of_file(tmp_path: Path, labels: list[Any]) -> None:
    rows = [
        {
            "Review Text": text,
            "label": labels[n % len(labels)],
            "owner": ["01", "1", "1.0"][n % 3],
            "n": n,
            "x": n / 8,
        }
        for n, text in enumerate(TEXTS)
    ]
    shape = {"text": "{n}/{x}: {Review Text}"}
    built = [
        build_data(
            DataSettings(source=str(path), **shape), ClientSettings(partition="natural", column="owner"), 3
        )
        for path in write_all(tmp_path, rows)
    ]
    assert set(built[0].clients) == {"01", "1", "1.0"}
    assert set(built[0].task.labels) == {str(label) for label in labels}
    parts = [
        c for client in built[0].clients.values() for c in (*client.train, *client.development, *client.test)
    ]
    wanted = {f"{row['n']}/{row['x']}: {row['Review Text']}": str(row["label"]) for row in rows}
    assert {example.text: built[0].task.labels[example.label] for example in parts} == wanted
    assert all(other == built[0] for other in built[1:])


def test_texts_to_write_in_every_kind_of_file(tmp_path: Path) -> None:
    rows = [{"source": f"q {n}", "target": n * 1.5, "answer": n} for n in range(12)]
    shape = {"task": "generation", "references": "answer", "test": "rows"}
    built = [
        build_data(
            DataSettings(source=str(path), train="rows", **shape), ClientSettings(partition="iid", count=2), 3
        )
        for path in write_all(tmp_path, rows)
    ]
    assert built[0].test == [Example(f"q {n}", target=str(n * 1.5), references=(str(n),)) for n in range(12)]
    assert all(other == built[0] for other in built[1:])
