"""Training examples as the model reads them, with the tokens that are learnt."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

from ..data.encode import encode_examples, input_cut
from ..data.examples import Example, FederatedData
from ..data.settings import DataSettings
from ..data.tokens import IGNORED, TokenizedExample, collate, paired, tokenize
from ..models.load import Base
from .report import Segment, ShownExample


def shown_examples(
    data: FederatedData, settings: DataSettings, base: Base, count: int, *, learns: bool
) -> list[ShownExample]:
    """Training examples at even distances among those of all clients.

    Args:
        learns: whether the method's clients learn tokens of targets; if not, none is marked.

    Raises:
        DataError, ModelError: see :func:`~fedcustom.data.tokens.tokenize`.
    """
    owned = [(name, example) for name, client in data.clients.items() for example in client.train]
    places = np.linspace(0, len(owned) - 1, min(count, len(owned))).round().astype(int)
    return [_shown(*owned[int(place)], settings, base, learns) for place in places]


def learnt_tokens(base: Base, row: TokenizedExample) -> tuple[list[int], list[bool]]:
    """The token ids of an example in the order in which they are read, and whether each is learnt: as the
    labels of a training batch say.
    """
    batch = collate(
        [row], base.tokenizer.pad_token_id or 0, base.task,
        sequence_to_sequence=base.sequence_to_sequence, all_answers=True,
    )  # fmt: skip
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"]
    if base.task.kind == "classification":
        return ids, [False] * len(ids)
    marks = (labels[0] != IGNORED).tolist()
    if base.sequence_to_sequence:
        return [*ids, *labels[0].tolist()], [False] * len(ids) + marks
    return ids, marks


def _shown(client: str, example: Example, data: DataSettings, base: Base, learns: bool) -> ShownExample:
    tokenizer = base.tokenizer
    if data.task == "retrieval":
        (encoded,) = encode_examples(tokenizer, [example], input_cut(data), base.token_rules)
        parts = segments(tokenizer, encoded.ids, [False] * len(encoded.ids))
        return ShownExample(client, parts, len(encoded.ids), 0, document=example.target)

    def read(examples: Sequence[Example]) -> list[TokenizedExample]:
        return tokenize(
            examples, tokenizer, base.task, data, sequence_to_sequence=base.sequence_to_sequence,
            rules=base.token_rules, chat=base.chat,
        )  # fmt: skip

    (row,) = paired([example], read)
    ids, marks = learnt_tokens(base, row)
    marks = [mark and learns for mark in marks]
    label = base.task.labels[example.label] if base.task.kind == "classification" else None
    rejected = None
    if row.rejected is not None:
        others, marked = learnt_tokens(base, row.other())
        rejected = segments(tokenizer, others, [mark and learns for mark in marked])
    return ShownExample(client, segments(tokenizer, ids, marks), len(ids), sum(marks), label, rejected)


def segments(tokenizer: Any, ids: Sequence[int], marks: Sequence[bool]) -> tuple[Segment, ...]:
    """The text of tokens, in pieces that are learnt or not; special tokens are written out."""

    def text(stop: int) -> str:
        return str(
            tokenizer.decode(list(ids[:stop]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    found, start, before = list[Segment](), 0, ""
    for mark, group in groupby(marks):
        stop = start + len(list(group))
        whole = text(stop)
        if whole.startswith(before):
            piece = whole[len(before) :]
        else:  # a character's bytes lie on both sides
            piece = str(tokenizer.decode(list(ids[start:stop]), skip_special_tokens=False))
        found.append(Segment(piece, bool(mark)))
        start, before = stop, whole
    return tuple(found)
