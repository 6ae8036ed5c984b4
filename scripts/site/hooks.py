"""Hooks of mkdocs: pages that are made at build, links out of docs/, and Markdown as GitHub reads it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
for place in (str(ROOT), str(ROOT / "src")):
    if place not in sys.path:
        sys.path.insert(0, place)

from scripts.site import links, markdown, python_page, recipe_page  # noqa: E402

MADE = {"reference/recipe.md": recipe_page.page, "reference/python.md": python_page.page}
"""Pages that are made at build, by their place in the site."""


def on_files(files: Any, *, config: Any) -> Any:
    """Add the pages that are made, and the files outside docs/ to which pages link."""
    from mkdocs.structure.files import File

    for place, make in MADE.items():
        files.append(File.generated(config, place, content=make()))
    for path in links.linked_from(ROOT, Path(config.docs_dir)):
        files.append(File.generated(config, links.place(path), content=links.shown(ROOT, path)))
    return files


def on_page_markdown(text: str, *, page: Any, config: Any, files: Any) -> str:
    """Point links out of docs/ at their copies, and separate lists from the paragraphs before them."""
    source = links.source(page.file.src_uri)
    return markdown.separated(text if source is None else links.rewritten(text, source, ROOT))


def on_page_content(html: str, *, page: Any, config: Any, files: Any) -> str:
    """Roles of docstrings, such as ``:class:``, become plain code."""
    return python_page.without_roles(html) if page.file.src_uri == "reference/python.md" else html
