"""Templates name columns and nothing else, wherever one is read."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from fedcustom.core.errors import DataError, RecipeError
from fedcustom.data.party_data import OwnDataSettings
from fedcustom.data.settings import DataSettings, PublicSettings
from fedcustom.data.templates import MAX_CHARACTERS, MAX_FIELDS, fields
from fedcustom.recipe.recipe import load_recipe

BAD = [
    ("{text:>100000000}", "format specification"),
    ("{text:{width}}", "format specification"),
    ("{text!r}", "conversion"),
    ("{text!a:>9}", "format specification or a conversion"),
    ("{text.__class__}", "name a column"),
    ("{text[0]}", "name a column"),
    ("{}", "name a column"),
    ("{0}", "name a column"),
    ("{text", r"write \{\{ and \}\}"),
    ("{text}" * (MAX_FIELDS + 1), "names 101 columns"),
    ("x" * (MAX_CHARACTERS + 1), "100001 characters"),
]


def test_the_columns_of_a_template_in_their_order() -> None:
    assert fields("{a}: {b} {{c}} {a}\n") == ("a", "b", "a")
    assert fields("no column") == ()


@pytest.mark.parametrize(("template", "message"), BAD, ids=[template[:20] for template, _ in BAD])
def test_a_template_that_names_more_than_columns(template: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        fields(template)
    places: list[tuple[type[Any], str]] = [
        *((DataSettings, key) for key in ("text", "prompt", "target")),
        *((OwnDataSettings, key) for key in ("text", "prompt", "target")),
        (PublicSettings, "text"),
    ]
    for settings, key in places:
        with pytest.raises(ValidationError, match=message):
            settings(**{key: template})
    for key in ("data.text", "data.prompt", "data.target", "public.text"):
        with pytest.raises(RecipeError, match=message) as refused:
            load_recipe({}, {key: template})
        assert key in str(refused.value)
        assert len(str(refused.value)) < 500
