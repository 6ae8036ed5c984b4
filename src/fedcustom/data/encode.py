"""Token ids of texts, cut to a length by the recipe's ``data.truncate``."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from ..core.errors import DataError, ModelError
from ..core.library_errors import from_library, in_one_line
from .examples import Example
from .settings import DataSettings
from .templates import Field
from .truncation import KEEP_END, KEEP_START, LITERAL, TEMPLATE, Side, Truncation, kept

AUTOMATIC = Truncation()

CHUNK, CHUNK_CHARACTERS = 8192, 2**22
"""Texts, and about how many characters, that are tokenised at a time."""

NOTHING: Mapping[str, int] = MappingProxyType({})


NO_TOKEN = "is empty: the tokenizer makes no token of it"
EMPTY_PROMPT = "is an empty prompt: the tokenizer makes no token of it, and there is nothing to continue"

SAME_TOKENS = "chosen and rejected are the same in their first tokens; raise data.max_target_length"

TARGET = "(target)"
"""The name under which cut tokens of targets are counted."""


class TextError(DataError):
    """A text that the model cannot take: its ``position`` among ``count``, and what the ``problem`` is."""

    def __init__(self, position: int, count: int, problem: str) -> None:
        super().__init__(f"text {position + 1} of {count} {problem}")
        self.position, self.problem = position, problem


class Encoded(NamedTuple):
    """Token ids of one text, and how many tokens of each column were cut."""

    ids: list[int]
    lost: Mapping[str, int] = NOTHING


@dataclass(frozen=True, slots=True)
class Cut:
    """How texts are cut: to ``limit`` tokens, special ones included, ``how`` and at which ``side``."""

    limit: int
    how: Truncation = AUTOMATIC
    side: Side = KEEP_START


@dataclass(frozen=True, slots=True)
class TokenRules:
    """What a model asks of the tokens of a text.

    Attributes:
        embeddings: how many tokens the model's embedding has, where the tokenizer has more.
        single: the token by which an encoder-decoder classifies, which must occur once in a text.
        model: the model's name, for messages.
    """

    embeddings: int | None = None
    single: int | None = None
    model: str = ""

    def problem(self, ids: Sequence[int], tokenizer: Any) -> str | None:
        """What is wrong with the tokens of a text, as the rest of a sentence that begins with it."""
        if self.embeddings is not None and (worst := max(ids, default=0)) >= self.embeddings:
            return (
                f"holds the token {tokenizer.convert_ids_to_tokens(worst)!r}, number {worst}; "
                f"{self.model} has embeddings of the first {self.embeddings} only"
            )
        if self.single is not None and (count := sum(one == self.single for one in ids)) != 1:
            token = tokenizer.convert_ids_to_tokens(self.single)
            return (
                f"has {count} end tokens {token!r}; {self.model} classifies a text by the one that the "
                f"tokenizer adds: take {token!r} out of the text"
            )
        return None


NO_RULES = TokenRules()


def input_cut(data: DataSettings) -> Cut:
    """How the inputs of a task are cut: ``data.max_length`` and ``data.truncate``."""
    return Cut(data.max_length, data.truncation, KEEP_END if data.writes else KEEP_START)


def encode_examples(
    tokenizer: Any, examples: Sequence[Example], cut: Cut, rules: TokenRules = NO_RULES
) -> Iterator[Encoded]:
    """Token ids of the examples' texts, in their order; see :func:`encode`."""
    return encode(tokenizer, [e.text for e in examples], cut, [e.fields for e in examples], rules)


def encode(
    tokenizer: Any,
    texts: Sequence[str],
    cut: Cut,
    fields: Sequence[tuple[Field, ...]] | None = None,
    rules: TokenRules = NO_RULES,
    *,
    special: bool = True,
) -> Iterator[Encoded]:
    """Token ids of texts with the tokenizer's ``special`` tokens, which are never cut.

    ``fields`` says for each text where its columns stand in it; without it a text is one column.

    Raises:
        DataError: a text has tokens that the model cannot take; says the number of the text, and no part of
            it but that token.
        ModelError: the tokenizer cannot read a text, or its special tokens alone are longer than the limit.
    """
    for start, stop in _chunks(texts):
        some = list(texts[start:stop])
        rows = _ids(tokenizer, some, add_special_tokens=special)
        long = [place for place, ids in enumerate(rows) if len(ids) > cut.limit]
        inner = _ids_and_offsets(tokenizer, [some[place] for place in long])
        lost: dict[int, Mapping[str, int]] = {}
        for place, (content, offsets) in zip(long, inner, strict=True):
            known = fields[start + place] if fields is not None else ()
            owners = _owners(tokenizer, some[place], len(content), offsets, known)
            names = [field.name for field in known]
            rows[place], lost[place] = _shortened(rows[place], content, owners, names, cut)
        for place, ids in enumerate(rows):
            if problem := rules.problem(ids, tokenizer):
                raise TextError(start + place, len(texts), problem)
            yield Encoded(ids, lost.get(place, NOTHING))


def refuse_conversations(examples: Sequence[Example]) -> None:
    """Refuse prompts that are more than one turn of a user, for a model that reads them as plain texts.

    Raises:
        DataError: names file and line.
    """
    for number, example in enumerate(examples, start=1):
        if len(example.messages) > 1:
            raise DataError(
                f"{example.where or f'example {number}'}: the prompt is a conversation of "
                f"{len(example.messages)} messages; model.base has no chat template to read it by; name a "
                "Jinja file in data.chat_template"
            )


def prompt_of(ids: list[int], tokenizer: Any) -> list[int]:
    """A decoder's prompt: without the end-of-sequence token that the tokenizer may add."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def encode_targets(
    tokenizer: Any, targets: Sequence[str], limit: int, rules: TokenRules = NO_RULES
) -> Iterator[Encoded]:
    """Token ids of targets with the end-of-sequence token; without it where ``limit`` tokens do not hold the
    whole target and that token. How many are cut is counted under :data:`TARGET`.
    """
    end = tokenizer.eos_token_id
    for encoded in encode(tokenizer, targets, Cut(2**62), rules=rules, special=False):
        ids = [*encoded.ids, end]
        lost = len(ids) - limit
        yield Encoded(ids[:limit], {TARGET: lost}) if lost > 0 else Encoded(ids)


def encode_passages(
    tokenizer: Any, passages: Sequence[str], limit: int, rules: TokenRules = NO_RULES
) -> Iterator[Encoded]:
    """Token ids of passages that an encoder reads, which lose their end."""
    return encode(tokenizer, passages, Cut(limit), rules=rules)


def shorten(tokenizer: Any, examples: Sequence[Example], cut: Cut) -> Iterator[tuple[str, Mapping[str, int]]]:
    """The examples' texts without what is cut, and how many tokens of each column that is. Special tokens are
    not counted, since the texts become parts of others.
    """
    for start, stop in _chunks([e.text for e in examples]):
        some = examples[start:stop]
        encoded = _ids_and_offsets(tokenizer, [example.text for example in some])
        for example, (content, offsets) in zip(some, encoded, strict=True):
            if len(content) <= cut.limit:
                yield example.text, NOTHING
                continue
            owners = _owners(tokenizer, example.text, len(content), offsets, example.fields)
            names = [field.name for field in example.fields]
            chosen = kept(owners, cut.limit, names, cut.how, cut.side)
            yield (
                _text_of(tokenizer, example.text, content, offsets, owners, chosen),
                _lost(owners, chosen, names),
            )


def _chunks(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    start = characters = 0
    for position, text in enumerate(texts):
        if position > start and (position - start == CHUNK or characters + len(text) > CHUNK_CHARACTERS):
            yield start, position
            start, characters = position, 0
        characters += len(text)
    if start < len(texts):
        yield start, len(texts)


def _ids(tokenizer: Any, texts: list[str], **options: Any) -> list[list[int]]:
    def call() -> list[list[int]]:
        return list(tokenizer(texts, verbose=False, **options)["input_ids"])

    return _readable(call) if texts else []


def _ids_and_offsets(
    tokenizer: Any, texts: list[str]
) -> list[tuple[list[int], list[tuple[int, int]] | None]]:
    """Token ids without special tokens, and which characters each token comes from, where that is known."""
    if not texts:
        return []
    if not tokenizer.is_fast:
        return [(ids, None) for ids in _ids(tokenizer, texts, add_special_tokens=False)]
    found = _readable(
        lambda: tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    )
    return list(zip(found["input_ids"], found["offset_mapping"], strict=True))


def _readable(call: Callable[[], Any]) -> Any:
    """The result of a call of the tokenizer.

    Raises:
        ModelError: it failed. A tokenizer raises many kinds of error, bare ``Exception`` among them.
    """
    try:
        return call()
    except Exception as error:
        if not from_library(error):
            raise
        reason = in_one_line(error)
        raise ModelError(f"model.base: its tokenizer cannot read a text of the data: {reason}") from error


def _owners(
    tokenizer: Any,
    text: str,
    count: int,
    offsets: Sequence[tuple[int, int]] | None,
    fields: Sequence[Field],
) -> list[int]:
    """The number of the column that each token comes from: that of the token's last character."""
    if not fields:
        return [LITERAL] * count
    if offsets is None:  # a tokenizer without offsets: columns begin where the tokens before them end
        ends = [field.start for field in fields] + [field.end for field in fields]
        lengths = [
            len(ids) for ids in _ids(tokenizer, [text[:end] for end in ends], add_special_tokens=False)
        ]
        bounds = list(zip(lengths[: len(fields)], lengths[len(fields) :], strict=True))
        places = range(count)
    else:
        bounds = [(field.start, field.end) for field in fields]
        places = [max(start, end - 1) for start, end in offsets]  # type: ignore[assignment]
    starts = [start for start, _ in bounds]
    owners = []
    for place in places:
        number = bisect_right(starts, place) - 1
        while number >= 0 and bounds[number][0] == bounds[number][1]:  # an empty column has no token
            number -= 1
        owners.append(number if number >= 0 and place < bounds[number][1] else LITERAL)
    return owners


def _shortened(
    ids: list[int], content: list[int], owners: list[int], names: list[str], cut: Cut
) -> tuple[list[int], Mapping[str, int]]:
    special = len(ids) - len(content)
    if special >= cut.limit:
        raise ModelError(
            f"data.max_length = {cut.limit}: the tokenizer adds {special} special tokens to each text, which "
            "leaves no room for it"
        )
    front = next((at for at in range(special + 1) if ids[at : at + len(content)] == content), 0)
    chosen = kept(owners, cut.limit - special, names, cut.how, cut.side)
    short = [*ids[:front], *(content[i] for i in chosen), *ids[front + len(content) :]]
    return short, _lost(owners, chosen, names)


def _lost(owners: Sequence[int], chosen: Sequence[int], names: Sequence[str]) -> Mapping[str, int]:
    counts = Counter(owners)
    counts.subtract(owners[i] for i in chosen)
    found = Counter[str]()
    for owner, count in counts.items():
        if count:
            found[TEMPLATE if owner == LITERAL else names[owner]] += count
    return found


def _text_of(
    tokenizer: Any,
    text: str,
    content: list[int],
    offsets: Sequence[tuple[int, int]] | None,
    owners: Sequence[int],
    chosen: Sequence[int],
) -> str:
    """The text without the tokens that are cut. Space that no token holds stays between different columns."""
    if offsets is None:
        return str(tokenizer.decode([content[i] for i in chosen]))
    pieces, at, previous = list[str](), 0, -1
    for i in chosen:
        if i > previous + 1:
            if previous >= 0:
                inside = owners[previous] == owners[previous + 1]
                pieces.append(text[at : offsets[previous][1] if inside else offsets[previous + 1][0]])
            at = offsets[i][0] if owners[i - 1] == owners[i] else offsets[i - 1][1]
        previous = i
    ending = len(text) if previous == len(content) - 1 else offsets[previous][1]
    return "".join([*pieces, text[at:ending]])
