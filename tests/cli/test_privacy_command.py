"""``privacy``: what a recipe promises, before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedcustom.recipe.recipe import load_recipe, to_toml
from helpers.commands import Result

FACTS: dict[str, Any] = {
    "rounds": {"count": 4, "clients_per_round": 2},
    "privacy": {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3},
}


@pytest.fixture
def file(small: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "private.toml"
    path.write_text(to_toml(load_recipe(small | FACTS)))
    return path


def test_it_says_what_is_promised_and_what_never_is(file: Path, command: Callable[..., Result]) -> None:
    """The four natural clients are counted in the data."""
    said = command("privacy", str(file))
    assert said.code == 0, said.error
    for text in ("promise", "2 groups of 2 of 4 clients", "noise over signal", "assumes", "never promised"):
        assert text in said.out
    assert "NOT VALID" not in said.out
    seeded = command("privacy", str(file), "--set", "privacy.randomness=seeded")
    assert "NOT VALID" in seeded.out


def test_json_is_the_record(file: Path, command: Callable[..., Result]) -> None:
    record = json.loads(command("privacy", str(file), "--json").out)
    assert record["unit"] == "client"
    assert record["participation"]["clients"] == 4


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("privacy.delta=0.5", "privacy.delta"),
        ("privacy.noise=sum", "privacy.noise"),
        ("aggregation.rule=median", "aggregation.rule"),
        ("training.fit_head_rounds=[1]", "model.normalize"),
        ("privacy=unset", "promises no privacy"),
        ("privacy.bands=3", "privacy.bands"),
    ],
)
def test_what_cannot_be_promised_is_refused_in_one_line(
    file: Path, command: Callable[..., Result], change: str, key: str
) -> None:
    said = command("privacy", str(file), "--set", change)
    assert said.code == 2
    assert key in said.error
    assert len(said.error.strip().splitlines()) == 1
