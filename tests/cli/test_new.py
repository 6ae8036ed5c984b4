"""``fedcustom new``: with a terminal, without one, and what it writes."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest

from fedcustom.recipe.recipe import load_recipe
from helpers.tables import phrase, table, write_table


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def reviews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = table(
        36, review=lambda n, d: phrase(d), stars=lambda n, d: n % 3, topic=lambda n, d: n % 2,
        branch=lambda n, d: f"b{n % 2}",
    )  # fmt: skip
    (tmp_path / "data").mkdir()
    return write_table(tmp_path / "data" / "reviews.csv", rows)


def test_without_a_terminal(command: Any, reviews: Path, tmp_path: Path, tiny: dict[str, str]) -> None:
    said = command("new", reviews)
    assert said.code == 2
    assert (
        said.error.strip() == "error: there is no terminal to ask on: add --yes to take what the data suggest"
    )
    said = command("new", reviews, "--yes")
    assert said.code == 2
    assert "2 columns may be the label; pass --label (one of: stars, topic)" in said.error
    assert not (tmp_path / "recipe.toml").exists()
    given = ("--label", "stars", "--base", tiny["bert"], "--out", "made/recipe.toml")
    said = command("new", "data/reviews.csv", "--yes", *given)
    assert said.code == 0, said.error
    assert "columns that are not used: topic" in said.error
    text = (tmp_path / "made" / "recipe.toml").read_text()
    assert 'source = "../data/reviews.csv"' in text
    assert "# 36 rows" in text
    recipe = load_recipe(tmp_path / "made" / "recipe.toml")
    assert (recipe.data.label, recipe.clients.column) == ("stars", "branch")
    said = command("new", "data/reviews.csv", "--yes", *given)
    assert said.code == 2
    assert "is there already; --force overwrites it" in said.error
    assert command("new", "data/reviews.csv", "--yes", "--force", *given).code == 0


def test_on_a_terminal(
    reviews: Path, tmp_path: Path, tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enter takes a proposal; what is no answer is asked again."""
    from fedcustom.cli.app import app

    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(sys, "stdin", Terminal(f"\n{tiny['bert']}\nstarz\ntopic\n\nnone\n"))
    app(args=["new", "data/reviews.csv"], standalone_mode=False)
    recipe = load_recipe(tmp_path / "recipe.toml")
    assert (recipe.data.label, recipe.data.text) == ("topic", "{review}")
    assert recipe.clients.partition == "iid"
    assert "2 columns may be the label" in shown.getvalue()
