"""Truncation: the rule against brute force, token ids against plain ``transformers``, counts by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcustom.core.errors import DataError, ModelError, RecipeError
from fedcustom.data.encode import Cut, TokenRules, encode, encode_examples, input_cut, shorten
from fedcustom.data.examples import Example, LearningTask, input_of, make_examples
from fedcustom.data.settings import DataSettings
from fedcustom.data.templates import Field, fill, places
from fedcustom.data.tokens import tokenize
from fedcustom.data.truncation import (
    KEEP_END,
    KEEP_START,
    LITERAL,
    TEMPLATE,
    CutCount,
    Truncation,
    in_words,
    kept,
)
from fedcustom.data.truncation_count import Reading, count_cuts
from fedcustom.recipe.recipe import load_recipe
from helpers.tiny_models import tiny_tokenizer

QUESTION = " Which animal sees the old house?"
CONTEXT = "the old cat near a small house " * 30


def with_special_tokens() -> Any:
    """The tiny tokenizer, with a beginning and an end token around each text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def word_tokenizer() -> Any:
    """A tokenizer of lower-case words, as BERT's: it drops spaces."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *"abcdefghij", "question", ":"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


# --- the rule ---


def one_by_one(lengths: list[int], room: int) -> list[int]:
    """What is left of columns of which the longest loses a token at a time; of equally long ones that which
    was the shortest, or stands first.
    """
    left = list(lengths)
    while sum(left) > room:
        longest = [i for i, n in enumerate(left) if n == max(left)]
        left[min(longest, key=lambda i: (lengths[i], i))] -= 1
    return left


def owners_of(lengths: list[int], literals: int) -> list[int]:
    """Columns with template text before, between and behind them."""
    owners = [LITERAL] * literals
    for number, length in enumerate(lengths):
        owners += [number] * length + [LITERAL] * literals
    return owners


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=4),
    st.integers(0, 2),
    st.integers(1, 40),
    st.sampled_from([KEEP_START, KEEP_END]),
)
@settings(max_examples=150)
def test_the_rule(lengths: list[int], literals: int, room: int, side: Any) -> None:
    owners, names = owners_of(lengths, literals), [f"c{i}" for i in range(len(lengths))]
    left = room - literals * (len(lengths) + 1)
    everything = list(range(len(owners)))
    if len(owners) <= room or left < 1:
        for how in ("auto", "longest-first", "c0"):
            chosen = kept(owners, room, names, Truncation(how), side)
            assert chosen == (everything[:room] if side == KEEP_START else everything[-room:])
        return
    longest = max(lengths)
    others = sum(lengths) - longest
    alone = [n if i != lengths.index(longest) else left - others for i, n in enumerate(lengths)]
    rest = sum(lengths[1:])
    expected = {
        "longest-first": one_by_one(lengths, left),
        "auto": alone if others <= left else one_by_one(lengths, left),
        "c0": [left - rest, *lengths[1:]] if rest <= left else [0, *one_by_one(lengths[1:], left)],
    }
    for how, wanted in expected.items():
        chosen = kept(owners, room, names, Truncation(how), side)
        assert chosen == sorted(set(chosen))
        assert len(chosen) == room
        assert [sum(owners[i] == column for i in chosen) for column in range(len(lengths))] == wanted
        for column, count in enumerate(wanted):  # what is kept of a column is its beginning, or its end
            own = [i for i, owner in enumerate(owners) if owner == column]
            part = own[:count] if side == KEEP_START else own[len(own) - count :]
            assert [i for i in chosen if owners[i] == column] == part


def test_a_question_behind_a_long_context_is_never_cut() -> None:
    for question in range(1, 13):
        owners = [0] * 100 + [LITERAL] * 2 + [1] * question
        chosen = kept(owners, 15, ["context", "question"], Truncation())
        assert chosen[-question - 2 :] == list(range(100, 102 + question))


# --- token ids ---


@pytest.mark.parametrize("task", ["classification", "generation"])
@pytest.mark.parametrize("make", [tiny_tokenizer, with_special_tokens])
def test_the_longest_column_is_cut(make: Any, task: Any) -> None:
    tokenizer = make()
    data = DataSettings(task=task, text="{c} Q:{q}", prompt="{c} Q:{q}", max_length=40)
    row = {"c": CONTEXT.strip(), "q": QUESTION}
    example = input_of("{c} Q:{q}", row, "")
    (encoded,) = encode_examples(tokenizer, [example], input_cut(data))
    whole = tokenizer(example.text)["input_ids"]
    special = tokenizer.num_special_tokens_to_add()
    tail = tokenizer(" Q:" + QUESTION, add_special_tokens=False)["input_ids"]
    context = tokenizer(row["c"], add_special_tokens=False)["input_ids"]
    room = 40 - special - len(tail)
    part = context[:room] if task == "classification" else context[-room:]
    begin, end = ([1], [2]) if special else ([], [])
    assert encoded.ids == [*begin, *part, *tail, *end]
    assert encoded.lost == {"c": len(whole) - 40}


@pytest.mark.parametrize("make", [tiny_tokenizer, with_special_tokens])
@pytest.mark.parametrize(("how", "side"), [("keep-start", "right"), ("keep-end", "left")])
def test_a_whole_text_is_cut_as_transformers_does(make: Any, how: str, side: str) -> None:
    ours, theirs = make(), make()
    theirs.truncation_side = side
    example = input_of("{c} Q:{q}", {"c": CONTEXT, "q": QUESTION}, "")
    for limit in (5, 17, 64):
        (encoded,) = encode_examples(ours, [example], Cut(limit, Truncation(how)))
        assert encoded.ids == theirs(example.text, truncation=True, max_length=limit)["input_ids"]
        assert sum(encoded.lost.values()) == len(theirs(example.text)["input_ids"]) - limit


def test_a_prompt_of_one_column_is_cut_on_the_left_as_transformers_does() -> None:
    ours, theirs = with_special_tokens(), with_special_tokens()
    theirs.truncation_side = "left"
    data = DataSettings(task="generation", max_length=16)
    example = input_of("{source}", {"source": CONTEXT}, "")
    (tokens,) = tokenize([example], ours, LearningTask("generation"), data, sequence_to_sequence=False)
    cut = theirs(CONTEXT, truncation=True, max_length=16)["input_ids"]
    assert tokens.source.tolist() == cut[:-1]  # the target follows in place of the end token
    (tokens,) = tokenize([example], ours, LearningTask("generation"), data, sequence_to_sequence=True)
    assert tokens.source.tolist() == cut


@pytest.mark.parametrize("make", [tiny_tokenizer, with_special_tokens])
def test_pairs_are_cut_as_transformers_does(make: Any) -> None:
    tokenizer = make()
    row = {"a": ("the old cat likes bread " * 12).strip(), "b": " the river near a school" * 9}
    example = input_of("{a}{b}", row, "")
    (encoded,) = encode_examples(tokenizer, [example], Cut(41, Truncation("longest-first")))
    # Two texts have other special tokens between them, so they are compared without any.
    pair = tokenizer(
        row["a"], row["b"], add_special_tokens=False, truncation="longest_first",
        max_length=41 - tokenizer.num_special_tokens_to_add(),
    )["input_ids"]  # fmt: skip
    inner = encoded.ids[1:-1] if tokenizer.num_special_tokens_to_add() else encoded.ids
    assert inner == pair


def test_texts_that_fit_are_what_they_were() -> None:
    tokenizer = with_special_tokens()
    texts = ["the cat", "</s> in a text <s>", "\u00e4\U0001f600 x", "  ", "the old cat " * 8]
    found = [each.ids for each in encode(tokenizer, texts, Cut(64))]
    assert found == [tokenizer(text)["input_ids"] for text in texts]


def test_a_tokenizer_that_drops_spaces() -> None:
    tokenizer = word_tokenizer()
    example = input_of("{c}\n\nQuestion: {q}", {"c": "a b c d e f g", "q": "h i"}, "")
    (encoded,) = encode_examples(tokenizer, [example], Cut(7))
    assert tokenizer.convert_ids_to_tokens(encoded.ids) == ["a", "b", "c", "question", ":", "h", "i"]
    ((text, lost),) = shorten(tokenizer, [example], Cut(7))
    assert (text, lost) == ("a b c\n\nQuestion: h i", {"c": 4})
    ((text, _),) = shorten(tokenizer, [example], Cut(7, side=KEEP_END))
    assert text == "e f g\n\nQuestion: h i"
    within = input_of("Question: {c} : {q}", {"c": "a b c d e f g", "q": "h i"}, "")
    ((text, _),) = shorten(tokenizer, [within], Cut(7, side=KEEP_END))
    assert text == "Question: f g : h i"
    ((text, lost),) = shorten(tokenizer, [example], Cut(3, Truncation(KEEP_START)))
    assert (text, lost) == ("a b c", {"c": 4, TEMPLATE: 2, "q": 2})


def test_a_tokenizer_without_offsets() -> None:
    class Slow:
        """The same tokens, but nothing on where they come from, as of tokenizers written in Python."""

        is_fast = False

        def __init__(self) -> None:
            self.tokenizer = tiny_tokenizer()

        def __call__(self, texts: Any, **options: Any) -> Any:
            assert "return_offsets_mapping" not in options
            return self.tokenizer(texts, **options)

    example = input_of("{c} Q:{q}", {"c": CONTEXT.strip(), "q": QUESTION}, "")
    for limit in (20, 40):
        slow, fast = (list(encode_examples(t, [example], Cut(limit))) for t in (Slow(), tiny_tokenizer()))
        assert slow == fast


def test_no_room_beside_special_tokens() -> None:
    tokenizer = with_special_tokens()
    with pytest.raises(ModelError, match=r"data.max_length = 2: the tokenizer adds 2 special tokens"):
        list(encode(tokenizer, ["the old cat"], Cut(2)))


# --- targets ---


@pytest.mark.parametrize(("limit", "lost"), [(3, 5), (7, 1), (8, 0), (20, 0)])
def test_a_target_that_is_cut_has_no_end(limit: int, lost: int) -> None:
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "j"
    data = DataSettings(task="generation", max_target_length=limit)
    example = Example("a", target="a b c d e f g")
    (tokens,) = tokenize([example], tokenizer, LearningTask("generation"), data, sequence_to_sequence=False)
    whole = tokenizer("a b c d e f g j")["input_ids"]
    assert tokens.target.tolist() == whole[:limit]
    counted = count_cuts(tokenizer, {"train": [("x", [example])]}, data, Reading())
    assert counted == {"train": CutCount(1, 0, {}, int(lost > 0), lost)}


# --- rules and counts ---


def test_counts() -> None:
    tokenizer = tiny_tokenizer()
    data = DataSettings(text="{c} Q:{q}", max_length=24)
    rows = [{"c": CONTEXT[: 31 * n].strip(), "q": QUESTION, "label": "a"} for n in range(1, 8)]
    examples = make_examples(rows, data, ["a"], scoring=False, where="")
    lengths = [len(tokenizer(e.text)["input_ids"]) for e in examples]
    over = [n - 24 for n in lengths if n > 24]
    assert 0 < len(over) < 7
    parts = {"train": [("here", examples[:3]), ("there", examples[3:])], "test": [("", examples[:1])]}
    found = count_cuts(tokenizer, parts, data, Reading())
    assert found["train"] == CutCount(7, len(over), {"c": sum(over)}, 0, 0)
    assert in_words(found)[0].startswith(
        f"inputs longer than data.max_length are cut: {len(over)} of 7 train ({sum(over)} tokens of c)"
    )
    long = data.model_copy(update={"max_length": 10_000})
    assert in_words(count_cuts(tokenizer, parts, long, Reading())) == []


def test_a_token_that_the_model_has_no_embedding_of() -> None:
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    tokenizer.add_tokens(["<new>"])
    rules = TokenRules(embeddings=size, model="tiny")
    parts = {"train": [("a", [Example("the cat")] * 3), ("b", [Example("a dog"), Example("the <new> cat")])]}
    with pytest.raises(
        DataError, match=rf"client 'b', train example 2 holds the token '<new>', number {size}"
    ):
        count_cuts(tokenizer, parts, DataSettings(), Reading(), rules)
    with pytest.raises(DataError, match="text 2 of 2 holds the token"):
        list(encode(tokenizer, ["a", "<new>"], Cut(9), rules=rules))


def test_an_end_token_within_a_text() -> None:
    tokenizer = with_special_tokens()
    rules = TokenRules(single=2, model="bart")
    parts = {"test": [("", [Example("the cat"), Example("<s>old</s> cat")])]}
    with pytest.raises(
        DataError, match=r"^test example 2 has 2 end tokens '</s>'; bart classifies a text by"
    ):
        count_cuts(tokenizer, parts, DataSettings(), Reading(), rules)


def test_empty_prompts() -> None:
    tokenizer = word_tokenizer()
    data = DataSettings(task="generation")
    parts = {"train": [("a", [Example("b", target="c"), Example(" \n", target="c")])]}
    with pytest.raises(DataError, match="client 'a', train example 2 is empty: the tokenizer makes no token"):
        count_cuts(tokenizer, parts, DataSettings(), Reading())
    task = LearningTask("classification", ("x",))
    with pytest.raises(DataError, match="text 2 of 2 is empty"):
        tokenize(parts["train"][0][1], tokenizer, task, DataSettings(), sequence_to_sequence=False)
    tokenizer.eos_token = "j"
    with pytest.raises(DataError, match="client 'a', train example 2 is an empty prompt"):
        count_cuts(tokenizer, parts, data, Reading())
    with pytest.raises(DataError, match="text 1 of 1 is an empty prompt"):
        tokenize([Example(" ")], tokenizer, LearningTask("generation"), data, sequence_to_sequence=False)


# --- places of columns, and the setting ---


@given(st.text(max_size=9), st.text(max_size=9))
def test_places(first: str, second: str) -> None:
    template, values = "{{{a}: {b b}}} and {a}", {"a": first, "b b": second}
    text = "{" + first + ": " + second + "} and " + first
    found = places(template, values)
    assert fill(template, values) == text
    assert [field.name for field in found] == ["a", "b b", "a"]
    assert [text[f.start : f.end] for f in found] == [first, second, first]


def test_an_altered_text_keeps_its_columns() -> None:
    example = Example("abcdefgh", fields=(Field("a", 0, 4), Field("b", 6, 8)))
    assert example.with_text("abcd").fields == (Field("a", 0, 2), Field("b", 3, 4))


@pytest.mark.parametrize(
    "value", ["context", "question", "auto", "keep-end", "auto:keep-start", "context:keep-end"]
)
def test_what_may_be_cut(value: str) -> None:
    data = {"truncate": value, "text": "{context} {question}"}
    assert load_recipe({"data": data}).data.truncate == value


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("contxt", "allowed: auto, longest-first, keep-start, keep-end, context, question; .* 'context'"),
        ("end", "allowed: auto"),
        ("context:end", "did you mean 'context'"),
        ("keep-end:keep-end", "allowed: auto"),
        ("", "allowed: auto"),
        ("label", "allowed: auto"),
    ],
)
def test_what_may_not(value: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe({"data": {"truncate": value, "text": "{context} {question}"}})
