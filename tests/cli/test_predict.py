"""``predict``: an answer for every input, checked as training checks its rows."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import fedcustom
from fedcustom.api import Run
from helpers.rows import make_rows, write_jsonl
from helpers.runs import rows_of


@pytest.fixture
def run(small: dict[str, Any], tmp_path: Path) -> Run:
    return fedcustom.run(small, {"rounds.count": 1}, out=tmp_path / "run")


def test_an_answer_for_every_line_of_a_text(
    command: Any, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["the old cat", "", "bread\u2028and\x0bsoup\x85", "  ", "river\r", "x\x1cy", "hill"]
    asked = [line.removesuffix("\r") for line in lines if line.strip()]
    wanted = dict(zip(asked, run.predict(asked), strict=True))
    for end in ("\n", ""):
        content = ("\ufeff" + "\n".join(lines) + end).encode()
        (tmp_path / "a.txt").write_bytes(content)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))
        for source in (tmp_path / "a.txt", "-"):
            said = command("predict", run.directory, "--input", source)
            assert said.code == 0, said.error
            answers = [json.loads(line) for line in said.out.splitlines()]
            assert len(answers) == len(lines)
            for line, answer in zip(lines, answers, strict=True):
                if line.strip():
                    assert answer["label"] == wanted[line.removesuffix("\r")]["label"]
                    assert answer["probability"] == round(wanted[line.removesuffix("\r")]["probability"], 4)
                else:
                    assert answer == {"label": None, "probability": None, "probabilities": None}
            assert "2 blank lines have null for an answer (the first is line 2)" in " ".join(
                said.error.split()
            )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": null}\n', "a.jsonl, line 2: column 'text' is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text": NaN}\n', "a.jsonl, line 2: column 'text' is NaN"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": ["b"]}\n', "a.jsonl, line 3: column 'text' holds a list"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "a.jsonl, line 2: column 'text' is empty"),
        ("a.jsonl", b'{"txt": "b"}\n', "a.jsonl, line 1: no column 'text'"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl, line 1: column 'text' is not UTF-8 text"),
        ("a.csv", b"text,n\na,1\n,2\n", "a.csv, line 3: column 'text' is empty"),
        ("a.csv", b"text,n\na,1\nb\n", "a.csv, line 3: 1 fields"),
        ("a.csv", b"text\n\xe9\n", "a.csv: not UTF-8 text (line 2, byte 6"),
        ("a.txt", b"a\n\xe9\n", "a.txt: not UTF-8 text (line 2, byte 3"),
        ("a.txt", b"", "a.txt: is empty"),
        ("a.jsonl", b"\n", "a.jsonl: is empty"),
    ],
)
def test_inputs_that_training_would_refuse(
    command: Any, run: Run, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    said = command("predict", run.directory, "--input", tmp_path / name)
    assert (said.code, said.out) == (2, "")
    assert message in " ".join(said.error.split())
    assert said.error.startswith("error: ")


def test_one_text_that_is_none(command: Any, run: Run) -> None:
    for text, message in (("", "column 'text' is empty"), ("a\udce9", "is not UTF-8 text")):
        said = command("predict", run.directory, text)
        assert said.code == 2
        assert message in " ".join(said.error.split())


def test_the_same_rows_in_every_kind_of_file(command: Any, run: Run, tmp_path: Path) -> None:
    rows = [{"text": text} for text in ("007", "NA", "1.50", "the cat")]
    write_jsonl(tmp_path / "a.jsonl", rows)
    pd.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False)
    pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("\n".join(row["text"] for row in rows))
    outputs = {
        command("predict", run.directory, "--input", tmp_path / f"a.{kind}").out
        for kind in ("jsonl", "csv", "parquet", "txt")
    }
    assert len(outputs) == 1
    assert len(outputs.pop().splitlines()) == 4


def test_twins_give_equal_runs(small: dict[str, Any], tmp_path: Path) -> None:
    """Labels, owners and texts that look like numbers or missing values, in three kinds of file."""
    topics = {"animal": "007", "food": "7", "place": "NA"}
    rows = [
        {"Review Text": f"{row['text']} {n}.0", "kind": topics[row["label"]], "owner": f"0{n % 3}", "n": n}
        for n, row in enumerate(make_rows(60, 0))
    ]
    write_jsonl(tmp_path / "a.jsonl", rows)
    pd.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False)
    pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    found = []
    for kind in ("jsonl", "csv", "parquet"):
        data = {
            "source": str(tmp_path / f"a.{kind}"), "text": "{n} {Review Text}", "label": "kind",
            "max_length": 24,
        }  # fmt: skip
        clients = {"partition": "natural", "column": "owner"}
        out = tmp_path / kind
        summary = fedcustom.run({**small, "data": data, "clients": clients}, out=out).summary
        lines = [
            {k: v for k, v in row.items() if k not in ("seconds", "peak_memory")} for row in rows_of(out)
        ]
        kept = {key: summary[key] for key in ("metrics", "labels")}
        found.append((kept, [(row.get("loss"), row.get("development")) for row in lines]))
        found[-1] += (
            (out / "predictions.jsonl").read_text(),
            (out / "model/model.safetensors").read_bytes(),
        )
    assert sorted(found[0][0]["labels"]) == ["007", "7", "NA"]
    assert found[0] == found[1] == found[2]


def test_an_empty_answer_is_said_to_be_empty(
    command: Any, generation: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fedcustom.run(generation, {"rounds.count": 1}, out=tmp_path / "run")
    monkeypatch.setattr(
        Run, "predict", lambda self, inputs: [{"text": " \n" if n else "a"} for n, _ in enumerate(inputs)]
    )
    (tmp_path / "a.txt").write_text("x\ny\n\nz")
    said = command("predict", run.directory, "--input", tmp_path / "a.txt")
    assert [json.loads(line)["text"] for line in said.out.splitlines()] == ["a", " \n", None, " \n"]
    assert "2 of 4 answers are empty (the first is number 2): the model ended" in " ".join(said.error.split())
    assert "conversations" not in said.error
    monkeypatch.setattr(Run, "predict", lambda self, inputs: [{"text": ""}])
    tokenizer = run.tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    monkeypatch.setattr(Run, "tokenizer", lambda self: tokenizer)
    one = command("predict", run.directory, "x")
    assert one.code == 0
    shown = " ".join(one.error.split())
    assert "the answer is empty" in shown
    assert "may lack the template of its conversations" in shown
