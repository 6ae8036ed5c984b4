"""Foreign text, made safe to print and to write."""

from __future__ import annotations

import re

UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, of which ESC moves a terminal's cursor
    "\ud800-\udfff"  # lone surrogates, which no encoding can write
    "\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]"  # line separators, and direction marks
)

UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
"""What no text of another party may hold: control characters but line breaks and tabs, lone surrogates."""


def printable(text: str, *, lines: bool = True, longest: int | None = None) -> str:
    """The text with everything escaped that a terminal obeys instead of showing, as in ``\\x1b``.

    Tabs stay; line breaks stay where ``lines`` is set, else they are escaped too. Of a text with more than
    ``longest`` characters, these are shown and " ..." follows.
    """
    cut = text if longest is None or len(text) <= longest else f"{text[:longest]} ..."
    escaped = UNPRINTABLE.sub(_escaped, cut)
    return escaped if lines else escaped.replace("\n", "\\n")


def _escaped(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
