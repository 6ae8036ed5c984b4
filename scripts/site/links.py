"""Links from pages to files outside docs/: the site has a copy of each, so that it needs no other host."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

FOLDER = "repository"
"""Where copies of files outside docs/ are in the site."""

FENCE = re.compile(r"^ {0,3}(```+|~~~+).*?^ {0,3}\1", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
ELSEWHERE = ("http:", "https:", "mailto:", "#")

LANGUAGES = {".toml": "toml", ".py": "python", ".json": "json", ".sh": "bash", ".ipynb": "json"}


def linked_from(root: Path, docs: Path) -> list[PurePosixPath]:
    """The files outside ``docs`` to which its pages link, directly or by a page among them, as paths from the
    repository's ``root``.
    """
    found: dict[PurePosixPath, None] = {}
    waiting = [PurePosixPath(page.relative_to(root).as_posix()) for page in sorted(docs.rglob("*.md"))]
    while waiting:
        page = waiting.pop(0)
        for target in targets((root / page).read_text(encoding="utf-8")):
            path = resolved(page, target)
            if path.parts[:1] == ("docs",) or path in found or not (root / path).is_file():
                continue
            found[path] = None
            if path.suffix == ".md":
                waiting.append(path)
    return list(found)


def targets(text: str) -> Iterator[str]:
    """The relative links of a page, outside of its code."""
    for match in LINK.finditer(FENCE.sub("", text)):
        if not match[2].startswith(ELSEWHERE):
            yield match[2].partition("#")[0]


def resolved(page: PurePosixPath, target: str) -> PurePosixPath:
    """The path from the repository's root that a link of a page names."""
    return PurePosixPath(os.path.normpath(page.parent / target))


def place(path: PurePosixPath) -> str:
    """The place in the site of a file of the repository."""
    if path.parts[0] == "docs":
        return path.relative_to("docs").as_posix()
    name = path.as_posix() if path.suffix == ".md" else f"{path.as_posix()}.md"
    return f"{FOLDER}/{name}"


def source(place_: str) -> PurePosixPath | None:
    """The file of the repository that a page of the site is made from; None where its links are its own."""
    if place_.startswith("reference/"):
        return None
    if place_.startswith(f"{FOLDER}/"):
        return PurePosixPath(place_).relative_to(FOLDER)
    return PurePosixPath("docs") / place_


def rewritten(text: str, page: PurePosixPath, root: Path) -> str:
    """The Markdown of a page with its links to files of the repository pointed at the site. A link that names
    no file is left as it is, for the strict build to refuse.
    """
    here = PurePosixPath(place(page)).parent

    def changed(match: re.Match[str]) -> str:
        target, mark, anchor = match[2].partition("#")
        if match[2].startswith(ELSEWHERE) or not (root / (path := resolved(page, target))).is_file():
            return match[0]
        if path.parts[0] == "docs" and page.parts[0] == "docs":
            return match[0]
        return f"{match[1]}{os.path.relpath(place(path), here)}{mark}{anchor}{match[3]}"

    parts, end = [], 0
    for fence in FENCE.finditer(text):
        parts += [LINK.sub(changed, text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, LINK.sub(changed, text[end:])])


def shown(root: Path, path: PurePosixPath) -> str:
    """The page of a file: Markdown as it is, anything else as code."""
    text = (root / path).read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    return f"# {path}\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{text.rstrip()}\n````\n"
