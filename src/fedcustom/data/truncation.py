"""Truncation: which tokens of a text that is too long are cut, by ``data.truncate``; counts of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..core.errors import nearest

Side = Literal["keep-start", "keep-end"]

AUTO, LONGEST_FIRST = "auto", "longest-first"
KEEP_START: Literal["keep-start"] = "keep-start"
KEEP_END: Literal["keep-end"] = "keep-end"
WORDS = (AUTO, LONGEST_FIRST, KEEP_START, KEEP_END)

LITERAL = -1
"""The owner of a token of the template's own text."""

EXCHANGES = "oldest exchanges"
"""The name under which tokens of exchanges are counted that a conversation loses."""

TEMPLATE = "(template)"
"""The name under which cut tokens of the template's own text are counted."""


@dataclass(frozen=True, slots=True)
class Truncation:
    """What is cut of a text that is too long.

    ``which`` is ``auto``, ``longest-first``, the name of a column, or ``keep-start`` or ``keep-end`` for the
    text as a whole. ``side`` says which end of a cut column is kept; None leaves that to the task.
    """

    which: str = AUTO
    side: Side | None = None

    @classmethod
    def parse(cls, value: str, columns: Collection[str]) -> Truncation:
        """Read a value of ``data.truncate``, where the template names these ``columns``.

        Raises:
            ValueError: it is neither one of the words nor a column; says what is allowed.
        """
        known = [*WORDS[:2], *dict.fromkeys(columns)]
        if value in WORDS or value in known:
            return cls(value)
        which, colon, side = value.rpartition(":")
        if colon and which in known and side in (KEEP_START, KEEP_END):
            return cls(which, side)
        raise ValueError(
            f"data.truncate = {value!r}{nearest(value, [*WORDS, *dict.fromkeys(columns)])} (all but the two "
            "keep- words may end in :keep-start or :keep-end)"
        )


def kept(
    owners: Sequence[int], room: int, names: Sequence[str], how: Truncation, side: Side = KEEP_START
) -> list[int]:
    """Positions of the tokens of one text that are kept: ``room`` of them.

    ``owners[i]`` is the number in ``names`` of the column that token ``i`` comes from, or :data:`LITERAL`;
    the tokens of a column stand side by side. ``side`` is which end of a cut column is kept where ``how``
    does not say.

    The template's own text is kept. ``auto`` cuts the longest column; where the others alone do not fit, it
    cuts as ``longest-first``, which brings the longest columns to one length, as ``transformers`` does. A
    named column is cut before all others, which are cut as ``longest-first`` once it is gone. Where the
    template's own text leaves no room, or no column is known, the text is cut as a whole.
    """
    if len(owners) <= room:
        return list(range(len(owners)))
    whole = how.which == KEEP_START or how.which == KEEP_END
    end = how.which if whole else how.side or side
    lengths = [0] * len(names)
    for owner in owners:
        if owner != LITERAL:
            lengths[owner] += 1
    left = room - (len(owners) - sum(lengths))
    if whole or left < 1 or not names:
        return list(range(room)) if end == KEEP_START else list(range(len(owners) - room, len(owners)))
    shares = _shares(lengths, left, [i for i, name in enumerate(names) if name == how.which], how.which)
    seen, found = Counter[int](), list[int]()
    for position, owner in enumerate(owners):
        number = seen[owner]
        seen[owner] += 1
        if owner == LITERAL or (
            number < shares[owner] if end == KEEP_START else number >= lengths[owner] - shares[owner]
        ):
            found.append(position)
    return found


def _shares(lengths: Sequence[int], room: int, first: Sequence[int], which: str) -> list[int]:
    """How many tokens of each column are kept; the sum is ``room``. ``first`` are cut before the others."""
    cut = list(first)
    if not cut and which != LONGEST_FIRST:
        cut = [max(range(len(lengths)), key=lambda i: lengths[i])]
    rest = [i for i in range(len(lengths)) if i not in cut]
    left = room - sum(lengths[i] for i in rest)
    shares = list(lengths)
    if cut and left >= 0:
        for i, share in zip(cut, _level([lengths[i] for i in cut], left), strict=True):
            shares[i] = share
        return shares
    if first:
        for i in cut:
            shares[i] = 0
        for i, share in zip(rest, _level([lengths[i] for i in rest], room), strict=True):
            shares[i] = share
        return shares
    return _level(lengths, room)


def _level(lengths: Sequence[int], room: int) -> list[int]:
    """``lengths`` with the longest ones brought to one length, so that their sum is ``room``; what is left
    over goes to the longest.
    """
    shares = [0] * len(lengths)
    open_ = list(range(len(lengths)))
    while open_ and room > 0:
        each = room // len(open_)
        short = [i for i in open_ if lengths[i] <= each]
        if not short:
            longest = sorted(open_, key=lambda i: (lengths[i], i))[len(open_) - room % len(open_) :]
            for i in open_:
                shares[i] = each + (i in longest)
            break
        for i in short:
            shares[i] = lengths[i]
            room -= lengths[i]
            open_.remove(i)
    return shares


@dataclass(frozen=True, slots=True)
class CutCount:
    """What is cut of one part of the data.

    Attributes:
        examples: how many examples the part has.
        inputs: how many of them have an input that is cut.
        tokens: how many tokens of inputs are cut, by column.
        targets: how many have a target that is cut.
        target_tokens: how many tokens of targets are cut; a target's end token is one.
        left_out: how many further examples there were, which were too long and are left out.
    """

    examples: int = 0
    inputs: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    targets: int = 0
    target_tokens: int = 0
    left_out: int = 0

    def __add__(self, other: CutCount) -> CutCount:
        """That of both parts together."""
        tokens = {name: self.tokens.get(name, 0) + more for name, more in other.tokens.items()}
        return CutCount(
            self.examples + other.examples,
            self.inputs + other.inputs,
            self.tokens | tokens,
            self.targets + other.targets,
            self.target_tokens + other.target_tokens,
            self.left_out + other.left_out,
        )


@dataclass(slots=True)
class CutTally:
    """A running count of texts that are cut as they are read: how many texts, how many of them were cut, and
    how many tokens that was.
    """

    texts: int = 0
    cut: int = 0
    tokens: int = 0

    def add(self, lost: int) -> None:
        """Count one text that lost so many tokens."""
        self.texts += 1
        self.cut += lost > 0
        self.tokens += lost

    def in_words(self, what: str) -> list[str]:
        """``3 of 40 texts (57 tokens)``, if any was cut."""
        return [f"{self.cut} of {self.texts} {what} ({self.tokens} tokens)"] if self.cut else []


def in_words(counts: Mapping[str, CutCount]) -> list[str]:
    """A sentence on the inputs that are cut, and one on the targets; none where nothing is."""
    inputs = [
        f"{one.inputs} of {one.examples} {part} ({_tokens(one.tokens)})"
        for part, one in counts.items()
        if one.inputs
    ]
    targets = [
        f"{one.targets} of {one.examples} {part} ({one.target_tokens} tokens)"
        for part, one in counts.items()
        if one.targets
    ]
    found = []
    if inputs:
        whole = any(EXCHANGES in one.tokens for one in counts.values())
        how = "whole exchanges, the oldest first" if whole else "data.truncate says what is cut"
        found.append(f"inputs longer than data.max_length are cut: {', '.join(inputs)}; {how}")
    if targets:
        found.append(f"targets longer than data.max_target_length are cut: {', '.join(targets)}")
    rows = {part: one for part, one in counts.items() if one.left_out}
    if rows:
        each = [f"{one.left_out} of {one.left_out + one.examples} {part}" for part, one in rows.items()]
        found.append(
            f"conversations with a last exchange longer than data.max_length are left out: {', '.join(each)}"
        )
    return found


def _tokens(tokens: Mapping[str, int]) -> str:
    if len(tokens) == 1:
        ((name, count),) = tokens.items()
        return f"{count} tokens of {name}"
    each = ", ".join(f"{count} of {name}" for name, count in tokens.items())
    return f"{sum(tokens.values())} tokens: {each}"
