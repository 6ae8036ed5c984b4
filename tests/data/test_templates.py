"""Templates name columns and nothing else, wherever one is read."""

from __future__ import annotations

import string
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedcustom.core.errors import DataError, RecipeError
from fedcustom.data.party_data import OwnDataSettings
from fedcustom.data.settings import DataSettings, PublicSettings
from fedcustom.data.templates import MAX_CHARACTERS, MAX_FIELDS, fields, fill
from fedcustom.recipe.recipe import load_recipe

BAD = [
    ("{text:>100000000}", "format specification"),
    ("{text:{width}}", "format specification"),
    ("{text!r}", "conversion"),
    ("{text!a:>9}", "format specification or a conversion"),
    ("{text:10}", "format specification"),
    ("{text:,.2f}", "format specification"),
    ("{text!r:^5}", "format specification or a conversion; write {text} alone"),
    ("{text[0]}", "picks from the list or object in 'text'; name a column"),
    ("{messages[0][content]}", "picks from the list or object in 'messages'; name a column"),
    ("{messages[-1][content]}", "picks from the list or object in 'messages'; name a column"),
    ("{messages[0].content}", "picks from the list or object in 'messages'; name a column"),
    ("{}", "name a column"),
    ("{  }", "name a column"),
    ("text}", r"write \{\{ and \}\}"),
    ("{{text}", r"write \{\{ and \}\}"),
    ("{text", r"write \{\{ and \}\}"),
    ("{text}" * (MAX_FIELDS + 1), "names 101 columns"),
    ("x" * (MAX_CHARACTERS + 1), "100001 characters"),
]


def test_the_columns_of_a_template_in_their_order() -> None:
    assert fields("{a}: {b} {{c}} {a}\n") == ("a", "b", "a")
    assert fields("no column") == ()
    assert fields("{{a}} {{{b}}}") == ("b",)


NAMES = ["Review Text", "review-text", "a.b", "0", "12", "text.__class__", "Größe", "ns:b", "Q: text", "Wow!",
    "price [USD]", "price[USD]",
    "a/b", "class", "日本", "%s", "$x", "a'b", 'a"b', "a\\b", "<input>", "*"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_any_text_between_braces_is_a_column(name: str) -> None:
    template = "{{" + "{" + name + "}" + "}} and {text}: {" + name + "}"
    assert fields(template) == (name, "text", name)
    values = {name: "the {0} value", "text": "{text}"}
    assert fill(template, values) == "{the {0} value} and {text}: the {0} value"
    assert DataSettings(text=template).text == template


@given(st.text("{}a :!.[0]\n", max_size=30))
@example("{a:} and {{a:}}")
def test_where_python_formats_plain_names_this_gives_the_same(template: str) -> None:
    """But for a column whose name ends in a colon, which Python takes for an empty specification."""
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError:
        return
    if "{a:}" in template.replace("{{", ""):
        return
    if all(name is None or (name == "a" and not spec and not how) for _, name, spec, how in pieces):
        assert fill(template, {"a": "x{}"}) == template.format_map({"a": "x{}"})


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
