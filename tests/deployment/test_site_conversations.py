"""A site with conversations: what its file declares, and what its policy says of a recipe's template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedcustom.core.errors import PolicyError
from fedcustom.data.settings import DataSettings, PublicSettings
from fedcustom.deployment.site.check import site_report
from fedcustom.deployment.site.data import SiteDataSettings, check_declared, declared_settings, read_site
from fedcustom.deployment.site.policy import check_recipe
from fedcustom.deployment.site.settings import PolicySettings, SiteSettings
from fedcustom.deployment.site.template import site_template
from fedcustom.recipe.recipe import load_recipe
from helpers.chat import template
from helpers.conversations import chat_recipe, conversations
from helpers.rows import write_jsonl

CHAT = DataSettings(task="chat")


def test_a_site_declares_its_column_or_templates(tmp_path: Path) -> None:
    turns = [row["messages"] for row in conversations()]
    rows = [
        {"turns": one, "q": one[0]["content"], "a": one[1]["content"], "patient": str(n)}
        for n, one in enumerate(turns)
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    own = SiteDataSettings(train="rows.jsonl", columns=["turns"], messages="turns")
    check_declared(own)
    data = read_site(own, tmp_path, CHAT.model_copy(update={"messages": "patient"}), PublicSettings())
    assert data.settings.messages == "turns"
    assert all(list(row) == ["turns"] for row in data.train)
    found = data.examples("train", [])
    assert [one.target for one in found] == [one[-1]["content"] for one in turns]
    assert found[2].where == "the train file, line 3"
    by_templates = SiteDataSettings(train="rows.jsonl", columns=["q", "a"], prompt="{q}", target="{a}")
    for recipe in (CHAT, CHAT.model_copy(update={"messages": "patient"})):
        found = read_site(by_templates, tmp_path, recipe, PublicSettings()).examples("train", [])
        assert [(one.text, one.target) for one in found] == [(row["q"], row["a"]) for row in rows]
    lines = list(site_report(SiteSettings(data=own), tmp_path / "site.toml"))
    assert "rows: 10 train, 0 development, 0 test" in lines


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({}, r'data.columns is not set .*: columns = \["messages"\]'),
        ({"columns": ["m"]}, 'data.messages is not set .*: messages = "messages"'),
        ({"columns": ["m"], "prompt": "{m}"}, "data.messages is not set"),
        ({"columns": ["m"], "messages": "n"}, "data.columns lacks a column"),
    ],
)
def test_what_a_site_does_not_declare_is_not_filled_in(own: dict[str, Any], said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        declared_settings(SiteDataSettings(**own), CHAT)


def test_an_undeclared_column_of_messages() -> None:
    with pytest.raises(PolicyError, match=r"data.messages names the column 'n', which data.columns does not"):
        check_declared(SiteDataSettings(columns=["m"], messages="n"))


def test_a_template_of_the_recipe_runs_where_the_policy_allows_it(tmp_path: Path) -> None:
    base = chat_recipe(tmp_path, "builtin:lm-small")
    allowed = PolicySettings(chat_templates=True)
    named = load_recipe(base, {"data.chat_template": template("chatml")})
    check_recipe(PolicySettings(), load_recipe(base))
    check_recipe(allowed, named)
    with pytest.raises(
        PolicyError, match=r"policy.chat_templates = false: the recipe brings a chat template"
    ):
        check_recipe(PolicySettings(), named)
    with pytest.raises(PolicyError, match="a site opens no files that a recipe names"):
        check_recipe(allowed, load_recipe(base, {"data.chat_template": "/etc/passwd"}))
    text = site_template(named)
    assert '\nmessages = "messages"\n' in text
    assert "# chat_templates = true" in text
