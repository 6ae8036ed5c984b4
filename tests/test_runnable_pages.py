"""Blocks of README and docs/ that are marked to be run do run, page by page (helpers/pages.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.pages import ROOT, blocks, is_slow, run_page

PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if blocks(page)]

MARKED = (
    *("federate.md", "newcomer.md", "python.md", "quickstart.md", "researcher.md"),
    "site_administrator.md",
)
"""Pages of which at least one block must be marked."""


def test_marks_are_found() -> None:
    assert set(MARKED) <= {page.name for page in PAGES}


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=page.name, marks=[pytest.mark.slow] if is_slow(page) else []) for page in PAGES],
)
def test_page_runs(page: Path, tmp_path: Path) -> None:
    done = run_page(page, tmp_path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
