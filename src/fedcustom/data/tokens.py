"""Tokenised examples and padded batches."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import DataError
from .chat_template import ChatTemplate
from .encode import (
    EMPTY_PROMPT,
    NO_RULES,
    NO_TOKEN,
    SAME_TOKENS,
    TextError,
    TokenRules,
    encode_examples,
    encode_targets,
    input_cut,
    prompt_of,
    refuse_conversations,
)  # fmt: skip
from .examples import Example, LearningTask
from .settings import DataSettings

IGNORED = -100
"""The label of positions that do not count in a loss."""

IN_MEMORY = 64 * 2**20
"""Bytes of token ids beyond which they are kept in a file."""

Batch = dict[str, Tensor]
Ids = np.ndarray[Any, np.dtype[np.int32]]

NO_IDS: Ids = np.empty(0, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class Rejected:
    """The other answer of a preference pair: its token ids, and ``reference``, what the reference model makes
    of the chosen answer and of this one: log-likelihoods in nats, not a number as long as it was not asked.
    """

    target: Ids
    reference: tuple[float, float] = (math.nan, math.nan)


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """Token ids of the input; for generation those of the target; for classification the label's number.

    ``answers`` are positions in the source whose tokens are learnt too: those of earlier answers of a
    conversation. Of a preference pair, ``target`` is the chosen answer.
    """

    source: Ids
    target: Ids
    label: int
    answers: Ids = field(default_factory=lambda: NO_IDS)
    rejected: Rejected | None = None

    @property
    def length(self) -> int:
        """How many tokens a model reads of it: of a pair, the prompt with either answer."""
        own = len(self.source) + len(self.target)
        return own if self.rejected is None else own + len(self.source) + len(self.rejected.target)

    def other(self) -> TokenizedExample:
        """The prompt of a pair with the rejected answer."""
        assert self.rejected is not None
        return TokenizedExample(self.source, self.rejected.target, self.label)

    @classmethod
    def of(
        cls, source: Sequence[int], target: Sequence[int], label: int = -1, answers: Sequence[int] = ()
    ) -> TokenizedExample:
        """From lists of token ids."""
        ids, places = np.asarray(source, dtype=np.int32), np.asarray(answers, dtype=np.int32)
        return cls(ids, np.asarray(target, dtype=np.int32), label, places)


def tokenize(
    examples: Sequence[Example],
    tokenizer: Any,
    task: LearningTask,
    data: DataSettings,
    *,
    sequence_to_sequence: bool,
    rules: TokenRules = NO_RULES,
    chat: ChatTemplate | None = None,
) -> list[TokenizedExample]:
    """Token ids of all examples, cut to the recipe's lengths; many of them lie in a file (:func:`packed`).

    A decoder's prompt keeps its beginning-of-sequence token, if the tokenizer adds one, but loses a closing
    end-of-sequence token, since its target follows. A target ends with the end-of-sequence token, unless it
    is cut: the model must not learn to stop in mid-sentence. Of conversations all this is as their template
    ``chat`` says.

    Raises:
        DataError, ModelError: see :func:`~.encode.encode`; or a text has no token.
    """
    if chat is not None:
        encoded = chat.encode(examples, data, rules)
        return packed([TokenizedExample.of(e.prompt, e.answer, answers=e.answers) for e in encoded])
    if task.preference:
        refuse_conversations(examples)
    sources = encode_examples(tokenizer, examples, input_cut(data), rules)
    if task.kind == "classification":
        nothing, classified = NO_IDS, list[TokenizedExample]()
        for source, example in zip(sources, examples, strict=True):
            if not source.ids:
                raise TextError(len(classified), len(examples), NO_TOKEN)
            row = np.asarray(source.ids, dtype=np.int32)
            classified.append(TokenizedExample(row, nothing, example.label))
        return packed(classified)
    targets = encode_targets(
        tokenizer, [example.target for example in examples], data.max_target_length, rules
    )
    result: list[TokenizedExample] = []
    for source, target in zip(sources, targets, strict=True):
        ids = source.ids if sequence_to_sequence else prompt_of(source.ids, tokenizer)
        if not ids:
            raise TextError(len(result), len(examples), EMPTY_PROMPT)
        result.append(TokenizedExample.of(ids, target.ids))
    return packed(result)


def paired(
    examples: Sequence[Example], read: Callable[[Sequence[Example]], list[TokenizedExample]]
) -> list[TokenizedExample]:
    """Token ids of preference pairs, as ``read`` tokenises examples with one target; an example without a
    rejected answer has no other.

    Raises:
        DataError: what is kept of the two answers is the same; or see :func:`tokenize`.
    """
    rows = read(examples)
    others = iter(read([replace(e, target=e.rejected) for e in examples if e.rejected]))
    found = list[TokenizedExample]()
    for example, row in zip(examples, rows, strict=True):
        if example.rejected:
            rejected = next(others).target
            if np.array_equal(row.target, rejected):
                raise DataError(f"{example.where or 'a pair'}: {SAME_TOKENS}")
            row = replace(row, rejected=Rejected(rejected))
        found.append(row)
    return found


def packed(examples: list[TokenizedExample], in_memory: int = IN_MEMORY) -> list[TokenizedExample]:
    """The same examples; if their ids need more than ``in_memory`` bytes, as views of a temporary file that
    is mapped into memory, so that the system keeps what is used and drops the rest.
    """
    parts = [ids for example in examples for ids in (example.source, example.target, example.answers)]
    ends = np.cumsum([len(ids) for ids in parts])
    if not examples or 4 * ends[-1] <= in_memory:
        return examples
    with tempfile.TemporaryFile() as file:
        flat: Any = np.asarray(np.memmap(file, dtype=np.int32, mode="w+", shape=(int(ends[-1]),)))
    for ids, end in zip(parts, ends.tolist(), strict=True):
        flat[end - len(ids) : end] = ids
    views = np.split(flat, ends[:-1])
    return [
        TokenizedExample(source, target, example.label, answers)
        for source, target, answers, example in zip(
            views[::3], views[1::3], views[2::3], examples, strict=True
        )
    ]


def collate(
    examples: Sequence[TokenizedExample],
    padding: int,
    task: LearningTask,
    *,
    sequence_to_sequence: bool,
    all_answers: bool = False,
) -> Batch:
    """One padded batch: ``input_ids`` and ``attention_mask`` of (examples, tokens), and ``labels``.

    Labels are (examples,) class numbers, or (examples, tokens) token ids with :data:`IGNORED` where nothing
    is to be learnt: on a decoder's prompt and on padding. With ``all_answers``, as in training, earlier
    answers in the prompt are learnt too. Padding is on the right.
    """
    if task.kind == "classification":
        batch = pad([example.source for example in examples], padding)
        batch["labels"] = torch.tensor([example.label for example in examples], dtype=torch.long)
        return batch
    if sequence_to_sequence:
        batch = pad([example.source for example in examples], padding)
        targets = pad([example.target for example in examples], padding)
        batch["labels"] = targets["input_ids"].masked_fill(targets["attention_mask"] == 0, IGNORED)
        return batch
    batch = pad([np.concatenate([example.source, example.target]) for example in examples], padding)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    for row, example in enumerate(examples):
        labels[row, : len(example.source)] = IGNORED
        if all_answers and len(example.answers):
            labels[row, example.answers] = batch["input_ids"][row, example.answers]
    batch["labels"] = labels
    return batch


def pad(rows: Sequence[np.ndarray[Any, np.dtype[np.int32]]], padding: int) -> Batch:
    """``input_ids`` and ``attention_mask`` of (rows, tokens), filled up on the right."""
    width = max(1, max(len(row) for row in rows))
    ids = np.full((len(rows), width), padding, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
        mask[number, : len(row)] = 1
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


def by_length(
    examples: Sequence[TokenizedExample], batch_size: int, *, equal: bool = False
) -> Iterator[list[int]]:
    """Positions in batches of similar length, longest first, so that little padding is computed on; with
    ``equal`` in batches of one length, which need none.
    """
    if equal:
        for positions in of_one_length(examples):
            for start in range(0, len(positions), batch_size):
                yield positions[start : start + batch_size]
        return
    order = sorted(
        range(len(examples)), key=lambda i: (-len(examples[i].source) - len(examples[i].target), i)
    )
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def of_one_length(examples: Sequence[TokenizedExample]) -> list[list[int]]:
    """Positions of examples whose sources are equally long, and whose targets are; longest first. Of pairs,
    both answers are.
    """
    groups: dict[tuple[int, int, int], list[int]] = {}
    for position, example in enumerate(examples):
        other = len(example.rejected.target) if example.rejected is not None else 0
        groups.setdefault((len(example.source), len(example.target), other), []).append(position)
    return [groups[lengths] for lengths in sorted(groups, reverse=True)]


def example_order(count: int, start: int, stop: int, seed: Sequence[int]) -> list[int]:
    """The positions of examples ``start`` to ``stop`` of an endless stream over ``count`` examples.

    The stream is one random permutation after the other, so that each pass sees every example once; it is a
    pure function of its arguments, so that work which is resumed goes on where it stopped.
    """
    positions: list[int] = []
    while start < stop:
        epoch, within = divmod(start, count)
        order = np.random.default_rng([*seed, epoch]).permutation(count)
        taken = order[within : within + stop - start]
        positions.extend(taken.tolist())
        start += len(taken)
    return positions
