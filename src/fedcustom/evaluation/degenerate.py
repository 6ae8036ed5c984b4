"""Degenerate outputs of a generator: caught in a loop, empty, or always the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

FEWEST_WORDS = 8
"""Words from which on a text can be repetitive."""

MOST_REPEATED = 0.5
"""The share of a text's 3-grams that may stand earlier in it."""

WARNED_FROM = 0.05
"""The share of texts from which on a warning is given."""

KINDS = {
    "empty": "are empty",
    "repetitive": "repeat themselves",
    "constant": "are one and the same text",
}
"""The kinds of degenerate texts, and what is said of such texts."""


def degenerate_shares(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """The shares (0 to 1) of texts that are degenerate, by kind; there must be one text at least, and each
    has one reference or more.

    - ``empty``: without a word;
    - ``repetitive``: at least :data:`FEWEST_WORDS` words, and over half of its 3-grams of words stand
      earlier in it; unless one of its references is so too;
    - ``constant``: one text, the same to the letter, makes up over half of all; unless one text is among the
      references of over half of them.
    """
    empty = sum(not text.split() for text in texts)
    repetitive = sum(
        is_repetitive(text) and not any(map(is_repetitive, wanted))
        for text, wanted in zip(texts, references, strict=True)
    )
    written = Counter(text for text in texts if text.split())
    wanted = Counter(text.strip() for each in references for text in {*each})
    most = max(written.values(), default=0)
    expected = max(wanted.values(), default=0)
    constant = most if 2 * most > len(texts) and 2 * expected <= len(texts) else 0
    counts = {"empty": empty, "repetitive": repetitive, "constant": constant}
    return {kind: count / len(texts) for kind, count in counts.items()}


def is_repetitive(text: str) -> bool:
    """Whether a text is caught in a loop: over half of its 3-grams of words stand earlier in it."""
    words = text.split()
    if len(words) < FEWEST_WORDS:
        return False
    grams = list(zip(words, words[1:], words[2:], strict=False))
    return len(grams) - len(set(grams)) > MOST_REPEATED * len(grams)


def in_words(shares: Mapping[str, float]) -> str | None:
    """What there is to warn of: ``40 % of the test outputs repeat themselves``; None where less than
    :data:`WARNED_FROM` of them are of any one kind.
    """
    said = [
        f"{100 * shares[kind]:.0f} % {text}"
        for kind, text in KINDS.items()
        if shares.get(kind, 0.0) >= WARNED_FROM
    ]
    return f"degenerate test outputs: {', '.join(said)}" if said else None
