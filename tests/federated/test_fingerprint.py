"""A run whose rows have changed: refused, or accepted and said."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import fedcustom
from fedcustom.core.errors import RunError
from fedcustom.federated.fingerprint import of_server
from fedcustom.federated.run import run_recipe
from fedcustom.federated.simulation import Federation, simulate
from fedcustom.recipe.recipe import load_recipe
from helpers.rows import make_rows, write_jsonl


class Stop(fedcustom.Callback):
    """Ends a run after its first round."""

    def on_round_end(self, row: dict[str, Any]) -> None:
        if row["round"] == 1:
            raise KeyboardInterrupt


class Notes(fedcustom.Callback):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_note(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture
def recipe(small: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    shutil.copytree(small["data"]["source"], tmp_path / "rows")
    return {**small, "data": {**small["data"], "source": str(tmp_path / "rows")}}


def stopped(recipe: dict[str, Any], out: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fedcustom.run(recipe, out=out, callbacks=[Stop()])


def changed(rows: list[dict[str, Any]], how: str) -> list[dict[str, Any]]:
    if how == "text":
        return [{**rows[0], "text": "another"}, *rows[1:]]
    if how == "label":
        return [{**rows[0], "label": "food" if rows[0]["label"] != "food" else "place"}, *rows[1:]]
    if how == "new label":
        return [{**rows[0], "label": "stone"}, *rows[1:]]
    if how == "more":
        return [*rows, rows[0]]
    if how == "fewer":
        return rows[:-4]
    if how == "order":
        return rows[::-1]
    return [{**rows[0], "site": "site-9"}, *rows[1:]]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("text", r"rows of 1 of 4 clients differ \(first 'site-0': 40 there, 40 here\)"),
        ("label", r"rows of 1 of 4 clients differ"),
        ("new label", r"the labels differ \('stone'\)"),
        ("more", r"rows of 1 of 4 clients differ \(first 'site-0': 40 there, 41 here\)"),
        ("fewer", r"rows of 4 of 4 clients differ \(first 'site-0': 40 there, 39 here\)"),
        ("order", r"clients"),
        ("owner", r"4 clients there, 5 here \('site-9'\)"),
    ],
)
def test_other_training_rows_are_refused(
    recipe: dict[str, Any], tmp_path: Path, how: str, message: str
) -> None:
    del recipe["data"]["test"]  # each client's 40 rows are its training, development and test part
    stopped(recipe, tmp_path / "out")
    write_jsonl(tmp_path / "rows" / "train.jsonl", changed(make_rows(160, 0), how))
    with pytest.raises(
        RunError, match=rf"the data are not those of this run: .*{message}.*--data-changed=accept"
    ):
        fedcustom.run(recipe, out=tmp_path / "out", resume=True)
    if how == "text":
        notes = Notes()
        run = fedcustom.run(
            recipe, out=tmp_path / "out", resume=True, data_changed="accept", callbacks=[notes]
        )
        assert run.summary["rounds"] == 2
        assert any("goes on with other data than it began with" in text for text in notes.texts)
        assert "goes on with other data" in (tmp_path / "out" / "warnings.log").read_text()


def test_a_finished_run_of_other_rows(recipe: dict[str, Any], tmp_path: Path, command: Any) -> None:
    recipe["rounds"] = {"count": 1}
    out, test = tmp_path / "out", tmp_path / "rows" / "test.jsonl"
    summary = fedcustom.run(recipe, out=out).summary
    written = (out / "data.json").read_text()
    assert "the" not in json.loads(written)["shared"]["test"]
    rows = make_rows(40, 2)
    (tmp_path / "rows" / "test.jsonl").write_text("\n\n".join(json.dumps({**r, "x": 1}) for r in rows))
    assert fedcustom.run(recipe, out=out).summary == summary  # another file, but the same rows
    write_jsonl(test, rows[1:])
    with pytest.raises(RunError, match=r"(rows of \d of 4 clients|test rows) differ"):
        fedcustom.run(recipe, out=out)
    (tmp_path / "r.toml").write_text(tomli_w.dumps(recipe))
    said = command("run", tmp_path / "r.toml", "--out", out)
    assert said.code == 2
    assert "--data-changed=accept" in " ".join(said.error.split())
    said = command("run", tmp_path / "r.toml", "--out", out, "--data-changed=accept")
    assert said.code == 0
    assert "was made with other data" in " ".join(said.error.split())
    test.unlink()
    notes = Notes()
    assert fedcustom.run(recipe, out=out, callbacks=[notes]).summary == summary
    assert any("test.jsonl: is no longer there, so it was not checked" in text for text in notes.texts)


def test_a_run_that_could_not_begin_leaves_nothing(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RunError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr("fedcustom.federated.simulation.load_for", fails)
        with pytest.raises(RunError, match="out of luck"):
            fedcustom.run(recipe, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_server_with_other_rows_of_its_own(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Across sites the server has test rows at most; clients and labels are the sites' concern."""

    def gather(*given: Any) -> Federation:
        parties = simulate(*given)
        return replace(parties, fingerprint=of_server(parties.data))

    checked, out = load_recipe(recipe), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_recipe(checked, out, gather=gather, callbacks=[Stop()])
    recorded = json.loads((out / "data.json").read_text())
    assert recorded["clients"] == recorded["files"] == {}
    assert recorded["labels"] == []
    assert recorded["shared"]["test"][0] == len((tmp_path / "rows" / "test.jsonl").read_text().splitlines())
    test = tmp_path / "rows" / "test.jsonl"
    write_jsonl(test, make_rows(39, 2))
    with pytest.raises(RunError, match=r"the test rows differ .*--data-changed=accept"):
        run_recipe(checked, out, gather=gather, resume=True)
    run_recipe(checked, out, gather=gather, resume=True, data_changed="accept")
    write_jsonl(test, make_rows(38, 2))  # of a finished run nothing is read again
    run_recipe(checked, out, gather=gather)


def test_the_same_rows_go_on(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["noise"] = {"labels": 0.2}
    stopped(recipe, tmp_path / "out")
    run = fedcustom.run(recipe, out=tmp_path / "out", resume=True)
    whole = fedcustom.run(recipe, out=tmp_path / "whole")
    assert run.summary["metrics"] == whole.summary["metrics"]
    assert (tmp_path / "out" / "data.json").read_text() == (tmp_path / "whole" / "data.json").read_text()
    assert fedcustom.run(recipe, out=tmp_path / "out").summary == run.summary
