"""Markdown as GitHub reads it, for Python-Markdown: a list or a table needs no empty line before it."""

from __future__ import annotations

import re

ITEM = re.compile(r"(?:[-*+] |\d+[.)] )")
FENCE = re.compile(r" {0,3}(```|~~~)")


def separated(text: str) -> str:
    """The text with an empty line between a paragraph and the list or table that follows it."""
    lines: list[str] = []
    fenced = False
    for line in text.split("\n"):
        before = lines[-1] if lines else ""
        if not fenced and _begins_block(line) and _is_paragraph(before, line):
            lines.append("")
        if FENCE.match(line):
            fenced = not fenced
        lines.append(line)
    return "\n".join(lines)


def _begins_block(line: str) -> bool:
    return ITEM.match(line) is not None or line.startswith("|")


def _is_paragraph(before: str, line: str) -> bool:
    """Whether a line is text before which what follows does not belong to the same list or table."""
    if not before.strip() or before.startswith(("#", " ", "\t", "|", ">")):
        return before.startswith("<!--")
    return not (ITEM.match(before) and ITEM.match(line))
