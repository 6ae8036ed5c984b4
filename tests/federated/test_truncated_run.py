"""What a run cuts: counted independently, said on the console, kept in the summary and the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import fedcustom
from fedcustom.core.errors import PolicyError
from fedcustom.core.files import read_json
from fedcustom.data.files import read_file
from fedcustom.data.settings import DataSettings
from fedcustom.deployment.site.data import SiteDataSettings, check_declared, declared_settings
from helpers.rows import make_rows, write_jsonl


@pytest.fixture
def long(tmp_path: Path) -> Path:
    """Rows with a context of 5 to 45 words in front of what is asked, and with one long target."""
    for split, count in (("train", 60), ("test", 12)):
        rows = make_rows(count, len(split))
        for number, row in enumerate(rows):
            row["context"] = ("the old cat sees a river " * (1 + number % 8)).strip()
            row["target"] += " and a small house" * (3 if number % 10 == 4 else 0)
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    return tmp_path


def test_a_run_says_what_it_cuts(
    generation: dict[str, Any], long: Path, tmp_path: Path, command: Any
) -> None:
    recipe = tmp_path / "recipe.toml"
    prompt = "{context} Q: {source} :"
    recipe.write_text(
        f'[model]\nbase = "{generation["model"]["base"]}"\n[data]\nsource = "{long}"\ntask = "generation"\n'
        f'test = "test"\nprompt = "{prompt}"\ntarget = " {{target}}"\nmax_length = 20\n'
        "max_target_length = 12\n"
        '[clients]\npartition = "iid"\ncount = 3\n[method]\nname = "lora"\n[rounds]\ncount = 1\n'
        "[evaluation]\nmax_new_tokens = 4\n"
    )
    out = tmp_path / "out"
    said = command("run", recipe, "--out", out)
    assert said.code == 0, said.error
    tokenizer = AutoTokenizer.from_pretrained(generation["model"]["base"])
    run = fedcustom.load(out)
    counted = run.summary["truncation"]
    rows = {part: read_file(long / f"{part}.jsonl") for part in ("train", "test")}
    prompts = [f"{r['context']} Q: {r['source']} :" for some in rows.values() for r in some]
    every = [len(tokenizer(text)["input_ids"]) for text in prompts]
    written = [len(tokenizer(f" {r['target']}")["input_ids"]) + 1 for some in rows.values() for r in some]
    # Development and clients' own test parts come out of the training rows.
    own_tests = counted["test"]["examples"] - len(rows["test"])
    assert counted["train"]["examples"] + counted["development"]["examples"] + own_tests == len(rows["train"])
    keys = ("inputs", "targets", "target_tokens")
    total = {key: sum(part[key] for part in counted.values()) for key in keys}
    assert total["inputs"] == sum(n > 20 for n in every) > 0
    assert sum(part["tokens"]["context"] for part in counted.values()) == sum(n - 20 for n in every if n > 20)
    assert total["targets"] == sum(n > 12 for n in written) > 0
    assert total["target_tokens"] == sum(n - 12 for n in written if n > 12)
    assert all(set(part["tokens"]) <= {"context"} for part in counted.values())
    for text in (said.error, (out / "warnings.log").read_text(), (out / "report.html").read_text()):
        plain, train = " ".join(text.split()), counted["train"]
        assert f"longer than data.max_length are cut: {train['inputs']} of {train['examples']} train" in plain
        assert f"max_target_length are cut: {train['targets']} of {train['examples']} train" in plain

    asked = {"context": "the old cat sees a river " * 9, "source": "kind food thing soup"}
    rows_file = write_jsonl(tmp_path / "asked.jsonl", [asked, asked | {"context": "the cat"}])
    said = command("predict", out, "--input", rows_file)
    assert "are cut: 1 of 2 given" in " ".join(said.error.split())
    # The answer is that to the same question behind the end of the context.
    tail = tokenizer(" Q: kind food thing soup :")["input_ids"]
    context = tokenizer(asked["context"])["input_ids"][-(20 - len(tail)) :]
    short = asked | {"context": tokenizer.decode(context)}
    assert run.predict([asked]) == run.predict([short])


def test_nothing_is_said_where_all_fits(small: dict[str, Any], tmp_path: Path) -> None:
    notes: list[str] = []

    class Listener(fedcustom.Callback):
        def on_note(self, text: str) -> None:
            notes.append(text)

    fedcustom.run(small, out=tmp_path / "out", callbacks=[Listener()])
    counted = read_json(tmp_path / "out" / "summary.json")["truncation"]
    assert [part["inputs"] for part in counted.values()] == [0] * len(counted)
    assert sum(counted[part]["examples"] for part in counted) == 160 + 40
    assert not any("cut" in note for note in notes)


def test_a_site_names_its_own_columns() -> None:
    recipe = DataSettings(text="{context} {question}", truncate="context")
    own = {"columns": ["body", "title", "y"], "text": "{title} {body}", "label": "y", "max_labels": 9}
    assert declared_settings(SiteDataSettings(**own), recipe).truncation.which == "auto"
    named = SiteDataSettings(**own, truncate="body:keep-end")
    check_declared(named)
    found = declared_settings(named, recipe).truncation
    assert (found.which, found.side) == ("body", "keep-end")
    with pytest.raises(PolicyError, match=r"data.truncate = 'context'; allowed: .*, title, body"):
        check_declared(SiteDataSettings(**own, truncate="context"))
