"""Short answers held against accepted ones: exact match and token F1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """The text in lower case without ASCII punctuation, the articles *a*, *an* and *the*, and repeated space,
    as SQuAD's evaluation compares answers (Rajpurkar et al. 2016).
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(text: str, references: Sequence[str]) -> float:
    """1 where the normalised text is that of a reference, else 0."""
    return float(normalised(text) in {normalised(reference) for reference in references})


def token_f1(text: str, references: Sequence[str]) -> float:
    """F1 (0 to 1) of the normalised text's words and those of the reference that it matches best. Two texts
    without any word match; one without words matches no other.
    """
    return max(_f1(normalised(text).split(), normalised(reference).split()) for reference in references)


def _f1(said: list[str], wanted: list[str]) -> float:
    if not said or not wanted:
        return float(said == wanted)
    common = (Counter(said) & Counter(wanted)).total()
    return 2 * common / (len(said) + len(wanted))
