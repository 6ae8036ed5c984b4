"""The documentation site: a strict build, nothing from elsewhere, and every setting and public name in it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest
from scripts.site import links, markdown, python_page

import fedcustom
from fedcustom.recipe.help import settings_help
from fedcustom.recipe.recipe import Recipe

ROOT = Path(__file__).parents[2]
pytest.importorskip("mkdocs", reason="needs mkdocs: pip install 'fedcustom[docs]'")


def build(to: Path, *, configuration: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    options = ["--strict", "--site-dir", str(to), "-f", str(configuration)]
    command = [sys.executable, "-m", "mkdocs", "build", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_site_builds_strictly(tmp_path: Path) -> None:
    done = build(tmp_path / "site")
    assert done.returncode == 0, done.stderr
    pages = {path: path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.html")}
    for path, html in pages.items():
        tags = re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", html)
        loaded = [tag for tag in tags if re.search(r"(?:src|href)=[\"']?(?:https?:)?//", tag)]
        assert not [tag for tag in loaded if 'rel="canonical"' not in tag], f"{path}: {loaded}"
        assert ":class:<code>" not in html, path
    settings = pages[tmp_path / "site" / "reference" / "recipe.html"]
    for key, *_ in settings_help(Recipe):
        if not key.startswith("["):
            assert f"<code>{key}</code>" in settings, key
    names = pages[tmp_path / "site" / "reference" / "python.html"]
    for name in fedcustom.__all__:
        assert re.search(rf'id="fedcustom[\w.]*\.{name}"', names), name
    assert (tmp_path / "site" / "repository" / "CONTRIBUTING.html").is_file()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("index.md", "# A\n\n[broken](missing.md)\n", "missing.md"),
        ("index.md", "# A\n\n[broken](#nowhere)\n", "nowhere"),
        ("other.md", "# Not in the navigation\n", "other.md"),
    ],
)
def test_strict_build_refuses(tmp_path: Path, file: str, text: str, message: str) -> None:
    """A broken link, a broken anchor, a page that the navigation lacks: by the settings of mkdocs.yml."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# A\n")
    (tmp_path / "docs" / file).write_text(text)
    given = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    validation = re.search(r"^validation:\n(?: +.*\n)+", given, re.MULTILINE)
    assert validation is not None
    configuration = tmp_path / "mkdocs.yml"
    configuration.write_text(f"site_name: a\nnav: [index.md]\n{validation[0]}")
    done = build(tmp_path / "site", configuration=configuration)
    assert done.returncode != 0
    assert message in done.stderr


def test_public_names_are_documented() -> None:
    assert python_page.undocumented() == []
    assert set(python_page.homes()) == set(fedcustom.__all__)


def test_links_out_of_docs_lead_to_copies() -> None:
    page = PurePosixPath("docs/tutorials/a.md")
    text = "[a](../../CONTRIBUTING.md#style) [b](../lora.md) [c](../../recipes/trec.toml)\n"
    text += "```\n[d](../../README.md)\n```\n"
    assert links.rewritten(text, page, ROOT) == (
        "[a](../repository/CONTRIBUTING.md#style) [b](../lora.md) [c](../repository/recipes/trec.toml.md)\n"
        "```\n[d](../../README.md)\n```\n"
    )
    back = links.rewritten("[x](docs/lora.md#fedsvd)", PurePosixPath("CONTRIBUTING.md"), ROOT)
    assert back == "[x](../lora.md#fedsvd)"
    assert "```toml" in links.shown(ROOT, PurePosixPath("recipes/trec.toml"))


def test_lists_and_tables_are_separated() -> None:
    text = "Text:\n- one\n- two\n  more\n\nText\n| a |\n|---|\n| b |\n```\nx\n- y\n```\n"
    assert markdown.separated(text) == (
        "Text:\n\n- one\n- two\n  more\n\nText\n\n| a |\n|---|\n| b |\n```\nx\n- y\n```\n"
    )
