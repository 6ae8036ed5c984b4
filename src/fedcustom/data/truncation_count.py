"""Counts of what truncation cuts: inputs and targets, and tokens by column."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from typing import Any

from ..core.errors import DataError
from .chat_template import ChatTemplate
from .encode import (
    EMPTY_PROMPT,
    NO_RULES,
    NO_TOKEN,
    SAME_TOKENS,
    TARGET,
    Encoded,
    TextError,
    TokenRules,
    encode_examples,
    encode_passages,
    encode_targets,
    input_cut,
    prompt_of,
    refuse_conversations,
    shorten,
)  # fmt: skip
from .examples import ClientData, Example, FederatedData
from .many_clients import ManyClients
from .settings import DataSettings
from .truncation import CutCount

PORTION = 2**16
"""Examples that are looked at together."""

MARGIN = 8
"""Tokens that a tokenizer may add to those of a text's characters."""

Owned = Sequence[tuple[str, Sequence[Example]]]
"""Lists of examples, each with whose it is, for messages."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How a method reads examples.

    Attributes:
        sequence_to_sequence: a prompt goes to an encoder, and not to a decoder that continues it.
        in_prompts: inputs are parts of longer prompts, so that special tokens do not count.
        targets: targets are tokenised too.
        chat: the template by which conversations are read.
    """

    sequence_to_sequence: bool = False
    in_prompts: bool = False
    targets: bool = True
    chat: ChatTemplate | None = None


def parts_of(data: FederatedData) -> dict[str, list[tuple[str, Sequence[Example]]]]:
    """The examples of each part, each once, by their owners: clients, or nobody (empty)."""
    clients = data.clients
    if isinstance(clients, ManyClients):  # whose examples for scores are nobody's
        shared = {"development": data.development, "test": data.test, "public": data.public}
        return {name: [("", part)] for name, part in {"train": clients.examples, **shared}.items() if part}
    parts: dict[str, list[tuple[str, Sequence[Example]]]] = {
        "train": [(name, client.train) for name, client in clients.items()],
        "development": _each_once(clients, "development", data.development),
        "test": _each_once(clients, "test", data.test),
        "public": [("", data.public)],
    }
    return {name: part for name, part in parts.items() if any(examples for _, examples in part)}


def _each_once(
    clients: Mapping[str, ClientData], part: str, shared: Sequence[Example]
) -> list[tuple[str, Sequence[Example]]]:
    owned: list[tuple[str, Sequence[Example]]] = [
        (name, getattr(client, part)) for name, client in clients.items()
    ]
    known = {id(example) for _, examples in owned for example in examples}
    return [*owned, ("", [example for example in shared if id(example) not in known])]


def count_cuts(
    tokenizer: Any,
    parts: Mapping[str, Owned],
    data: DataSettings,
    reading: Reading,
    rules: TokenRules = NO_RULES,
) -> dict[str, CutCount]:
    """Count what is cut of each part's examples.

    Raises:
        DataError: a text has no token, or tokens that the model cannot take; names part, client and number.
        ModelError: see :func:`~.encode.encode`.
    """
    found = {}
    for name, owned in parts.items():
        total, done = CutCount(), 0
        for examples in _portions(owned):
            try:
                total += _count(tokenizer, examples, data, reading, rules, targets=name != "public")
            except TextError as error:
                raise DataError(f"{_place(name, owned, done + error.position)} {error.problem}") from None
            done += len(examples)
        found[name] = total
    return found


def _portions(owned: Owned) -> Iterator[list[Example]]:
    """All examples in their order, so many at a time that they need little memory."""
    examples = (example for _, some in owned for example in some)
    while portion := list(islice(examples, PORTION)):
        yield portion


def _place(part: str, owned: Owned, position: int) -> str:
    ends = list(accumulate(len(examples) for _, examples in owned))
    at = next(number for number, end in enumerate(ends) if position < end)
    whose = f"client {owned[at][0]!r}, " if owned[at][0] else ""
    return f"{whose}{part} example {position - (ends[at - 1] if at else 0) + 1}"


def _count(
    tokenizer: Any,
    examples: Sequence[Example],
    data: DataSettings,
    reading: Reading,
    rules: TokenRules,
    *,
    targets: bool,
) -> CutCount:
    if data.task == "preference":
        if reading.chat is None:
            refuse_conversations(examples)
        data = data.model_copy(update={"task": "chat" if reading.chat is not None else "generation"})
        if any(example.rejected for example in examples):
            return _count_pairs(tokenizer, examples, data, reading, rules)
    inputs = cut_targets = target_tokens = 0
    tokens = Counter[str]()
    if reading.chat is not None:
        for conversation in reading.chat.encode(examples, data, rules):
            over = conversation.lost.pop(TARGET, 0)
            cut_targets += over > 0
            target_tokens += over
            inputs += bool(conversation.lost)
            tokens.update(conversation.lost)
        return CutCount(len(examples), inputs, dict(tokens), cut_targets, target_tokens)
    places = _to_look_at([example.text for example in examples], data.max_length, rules)
    for lost in _inputs(tokenizer, examples, places, data, reading, rules):
        inputs += bool(lost)
        tokens.update(lost)
    if targets and reading.targets and data.task != "classification":
        texts = [example.target for example in examples]
        places = _to_look_at(texts, data.max_target_length, rules)
        read = encode_passages if data.task == "retrieval" else encode_targets
        chosen = read(tokenizer, [texts[i] for i in places], data.max_target_length, rules)
        for encoded in _placed(chosen, places):
            cut_targets += bool(encoded.lost)
            target_tokens += sum(encoded.lost.values())
    return CutCount(len(examples), inputs, dict(tokens), cut_targets, target_tokens)


def _count_pairs(
    tokenizer: Any, pairs: Sequence[Example], data: DataSettings, reading: Reading, rules: TokenRules
) -> CutCount:
    """The same of preference pairs: a target is cut where one of the two answers is, or both are.

    Raises:
        DataError: what is kept of the two answers of a pair is the same.
    """

    def one_by_one(examples: Sequence[Example]) -> list[CutCount]:
        found = list[CutCount]()
        for position, example in enumerate(examples):
            alone = replace(example, rejected="")
            try:
                found.append(_count(tokenizer, [alone], data, reading, rules, targets=True))
            except TextError as error:
                raise TextError(position, len(examples), error.problem) from None
        return found

    chosen = one_by_one(pairs)
    others = [replace(example, target=example.rejected) for example in pairs]
    rejected = one_by_one(others)
    answers = (_answers(tokenizer, each, data, reading, rules) for each in (pairs, others))
    for example, one, other in zip(pairs, *answers, strict=True):
        if one == other:  # now, and not in the round in which its client is drawn for the first time
            raise DataError(f"{example.where or 'a pair'}: {SAME_TOKENS}")
    tokens = Counter[str]()
    for one in chosen:
        tokens.update(one.tokens)
    return CutCount(
        len(pairs),
        sum(one.inputs for one in chosen),
        dict(tokens),
        sum(bool(one.targets or other.targets) for one, other in zip(chosen, rejected, strict=True)),
        sum(one.target_tokens for one in (*chosen, *rejected)),
    )


def _answers(
    tokenizer: Any, examples: Sequence[Example], data: DataSettings, reading: Reading, rules: TokenRules
) -> Iterator[list[int]]:
    """The token ids of targets, or of last answers, as far as they are kept."""
    if reading.chat is not None:
        return (one.answer for one in reading.chat.encode(examples, data, rules))
    texts = [example.target for example in examples]
    return (one.ids for one in encode_targets(tokenizer, texts, data.max_target_length, rules))


def _inputs(
    tokenizer: Any,
    examples: Sequence[Example],
    places: Sequence[int],
    data: DataSettings,
    reading: Reading,
    rules: TokenRules,
) -> Iterator[Mapping[str, int]]:
    """How many tokens of each column are cut, for each of the inputs at ``places``."""
    chosen = [examples[i] for i in places]
    if reading.in_prompts:
        yield from (lost for _, lost in shorten(tokenizer, chosen, input_cut(data)))
        return
    continues = data.task == "generation" and not reading.sequence_to_sequence
    encoded = _placed(encode_examples(tokenizer, chosen, input_cut(data), rules), places)
    for place, (ids, lost) in zip(places, encoded, strict=True):
        if data.task == "generation" and not (prompt_of(ids, tokenizer) if continues else ids):
            raise TextError(place, len(examples), EMPTY_PROMPT)
        if not ids:
            raise TextError(place, len(examples), NO_TOKEN)
        yield lost


def _placed(encoded: Iterator[Encoded], places: Sequence[int]) -> Iterator[Encoded]:
    """The same; an error names the place of a text among all."""
    try:
        yield from encoded
    except TextError as error:
        raise TextError(places[error.position], len(places), error.problem) from None


def _to_look_at(texts: Sequence[str], limit: int, rules: TokenRules) -> list[int]:
    """Positions of the texts that must be tokenised to know whether they are cut. A text of ASCII characters
    has no more tokens than characters.
    """
    if rules.embeddings is not None or rules.single is not None:
        return list(range(len(texts)))
    return [
        position
        for position, text in enumerate(texts)
        if len(text) + MARGIN > limit or not text.isascii() or not text.strip()
    ]
