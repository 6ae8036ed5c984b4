"""Links, files and commands named in README, CONTRIBUTING, CHANGELOG and docs/ exist."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from fedcustom.cli.app import app
from fedcustom.recipe.recipe import load_recipe

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
MADE_AT_BUILD = {ROOT / "docs" / "reference" / name for name in ("recipe.md", "python.md")}
"""Pages of the documentation site that its build makes (scripts/site/)."""

MADE_BY_COMMANDS = ("build/", "runs/", "indexes/", "../", "federation")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    bare = [re.sub(r"[^\w\- ]", "", title.lower()) for title in titles]
    return {title.strip().replace(" ", "-") for title in bare}


def links(page: Path) -> Iterator[str]:
    """The relative links and images of a page."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http:", "https:", "mailto:")):
            yield target


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each ``fedcustom`` or ``python`` command in a page's code, and in the text's backticks."""
    text = page.read_text(encoding="utf-8")
    blocks = "\n".join(body for language, body in FENCE.findall(text) if language in ("", "bash", "console"))
    prose = FENCE.sub("", text)
    indented = "\n".join(re.findall(r"^ {4,}(\S.*)$", prose, re.MULTILINE))
    inline = "\n".join(re.findall(r"`((?:fedcustom|python scripts/)[^`\n]*)`", prose))
    code = re.sub(r"\\\n\s*", " ", f"{blocks}\n{indented}\n{inline}")
    for line in code.splitlines():
        command = re.sub(r"^\$ |^[A-Z_]+=\S+ ", "", line.strip())
        if command.startswith(("fedcustom ", "python scripts/")):
            yield shlex.split(re.sub(r"\s{2,}\S.*$", "", command), comments=True)


@cache
def command_line() -> Any:
    """The tree of commands."""
    return typer.main.get_command(app)


def options(words: list[str]) -> tuple[set[str], list[str]]:
    """The options of a ``fedcustom`` command, and the words after its name."""
    command = command_line()
    while hasattr(command, "commands") and words and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    unnamed = hasattr(command, "commands") and words and words[0] != "..." and words[0][0] != "-"
    assert not unnamed, f"no command {words}"
    known = {name for each in getattr(command, "params", []) for name in (*each.opts, *each.secondary_opts)}
    return known | {"--help", "-h", "--help-all"}, words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if file in MADE_AT_BUILD:
            continue
        assert file.exists(), f"{page.name}: {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page.name}: {target} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    for words in commands(page):
        if words[0] == "python":
            assert (ROOT / words[1]).is_file(), f"{page.name}: {words[1]}"
            continue
        known, rest = options(words[1:])
        for word in rest:
            name = word.partition("=")[0]
            if name.startswith("-") and name != "-":
                assert name in known, f"{page.name}: {' '.join(words)} has no option {name}"
            elif re.fullmatch(r"(recipes|experiments)/\S+\.toml", word):
                assert (ROOT / word).is_file(), f"{page.name}: {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_exist(page: Path) -> None:
    """Paths in backticks with a folder and a known ending are files of the repository or the package."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    for path in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|toml|md))`", prose):
        if not path.startswith(MADE_BY_COMMANDS):
            places = (ROOT / path, ROOT / "src" / "fedcustom" / path)
            assert any(place.is_file() for place in places), f"{page.name}: {path}"


def test_readme_recipe_is_valid(tmp_path: Path) -> None:
    blocks = FENCE.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    (text,) = [body for language, body in blocks if language == "toml"]
    assert tomllib.loads(text)
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    load_recipe(file)
