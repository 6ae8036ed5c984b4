"""Kinds of content that a client's answer may hold, by which a site's policy allows or denies it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

Content = Literal["updates", "counts", "sums", "logits", "vectors", "texts"]

CONTENTS: tuple[Content, ...] = get_args(Content)

MEANING: Mapping[Content, str] = {
    "updates": "changes of trained tensors",
    "counts": "numbers of examples, losses, and counts of an evaluation",
    "sums": "sums and gradients over vectors of texts, from which a text of a rare label can be guessed",
    "logits": "predictions for given texts, or scores of single examples",
    "vectors": "vectors of texts, or scores that reveal them, from which the texts can be guessed",
    "texts": "passages, answers, prompts, and the wording of errors",
}
