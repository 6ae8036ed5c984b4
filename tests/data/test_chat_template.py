"""Tokens and loss masks of conversations, against tokens piece by piece and plain ``transformers``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcustom.core.errors import DataError, ModelError
from fedcustom.data.chat_template import ChatTemplate
from fedcustom.data.conversations import Message, as_rows
from fedcustom.data.examples import Example, LearningTask
from fedcustom.data.settings import DataSettings
from fedcustom.data.tokens import IGNORED, collate, packed, tokenize
from fedcustom.data.truncation import EXCHANGES, CutCount, in_words
from fedcustom.data.truncation_count import Reading, count_cuts
from helpers.chat import CONTROL, END, chat_tokenizer

NAMES = list(CONTROL)
WITH_SYSTEM = [name for name in NAMES if name not in ("mistral", "gemma")]
ROOMY = DataSettings(task="chat", max_length=4096, max_target_length=4096)

Piece = tuple[str, bool]
"""A text, and whether it is learnt."""


def pieces(name: str, messages: list[Message]) -> list[Piece]:
    """What each template writes, by hand."""
    found: list[Piece] = [("<s>", False)] if name in ("llama3", "mistral", "gemma") else []
    if name == "smollm2" and messages[0].role != "system":
        default = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
        found += [
            ("<|im_start|>", False),
            (f"system\n{default}", False),
            ("<|im_end|>", False),
            ("\n", False),
        ]
    for message in messages:
        learnt = message.role == "assistant"
        if name == "mistral":
            text = message.content if learnt else f"[INST] {message.content} [/INST]"
            found += [(text, learnt), ("</s>", True)] if learnt else [(text, False)]
        elif name == "llama3":
            head = [("<|start_header_id|>", False), (message.role, False), ("<|end_header_id|>", False)]
            found += [*head, ("\n\n", False), (message.content.strip(), learnt), ("<|eot_id|>", learnt)]
        elif name == "gemma":
            role = "model" if learnt else "user"
            found += [("<start_of_turn>", False), (f"{role}\n", False), (message.content.strip(), learnt)]
            found += [("<end_of_turn>", learnt), ("\n", False)]
        elif name == "phi3":
            found += [(f"<|{message.role}|>", False), ("\n", False), (message.content, learnt)]
            found += [("<|end|>", learnt), ("\n", False)]
        else:
            found += [("<|im_start|>", False), (f"{message.role}\n", False), (message.content, learnt)]
            found += [("<|im_end|>", learnt), ("\n", False)]
    return found


def by_pieces(name: str, tokenizer: Any, messages: list[Message]) -> tuple[list[int], list[int]]:
    """Token ids up to the last answer's end, and labels of them."""
    ids, labels = list[int](), list[int]()
    given = pieces(name, messages)
    while not given[-1][1]:
        given.pop()
    for text, learnt in given:
        some = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += some
        labels += some if learnt else [IGNORED] * len(some)
    return ids, labels


def conversation(*turns: str, system: str | None = None) -> list[Message]:
    """Turns of a user and an assistant in turn."""
    begins = [Message("system", system)] if system else []
    roles = ("user", "assistant")
    return [*begins, *(Message(roles[i % 2], turn) for i, turn in enumerate(turns))]  # type: ignore[arg-type]


def example(messages: list[Message], where: str = "") -> Example:
    """The last message is the target."""
    *before, last = messages
    return Example(before[-1].content, target=last.content, messages=tuple(before), where=where)


TURNS = (
    "Is the cat old?",
    "Yes, it is.",
    "And the dog, near\nthat house?",
    "No.",
    "Why?",
    "It just\n\nis small.",
)


@pytest.mark.parametrize("padded_by_end", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_labels_are_answers_with_their_end_tokens(name: str, padded_by_end: bool) -> None:
    tokenizer = chat_tokenizer(name, padded_by_end=padded_by_end)
    chat = ChatTemplate(tokenizer, name)
    end = tokenizer.convert_tokens_to_ids(END[name])
    assert chat.end == end
    assert chat.marked == (name == "chatml_marked")
    conversations = [conversation(*TURNS[:count]) for count in (2, 4, 6)]
    if name in WITH_SYSTEM:
        conversations.append(conversation(*TURNS, system="Be brief, and kind."))
    task = LearningTask("generation", chat=True)
    tokens = tokenize(
        [example(messages) for messages in conversations], tokenizer, task, ROOMY,
        sequence_to_sequence=False, chat=chat,
    )  # fmt: skip
    for all_answers in (True, False):
        batch = collate(
            tokens, tokenizer.pad_token_id, task, sequence_to_sequence=False, all_answers=all_answers
        )
        for row, messages in enumerate(conversations):
            ids, labels = by_pieces(name, tokenizer, messages)
            prompt = tokenizer.apply_chat_template(as_rows(messages[:-1]), add_generation_prompt=True)[
                "input_ids"
            ]
            if not all_answers:
                labels[: len(prompt)] = [IGNORED] * len(prompt)
            width = batch["input_ids"].shape[1]
            assert batch["input_ids"][row].tolist() == ids + [tokenizer.pad_token_id] * (width - len(ids))
            assert batch["labels"][row].tolist() == labels + [IGNORED] * (width - len(ids))
            assert batch["attention_mask"][row].sum() == len(ids)
            assert tokens[row].source.tolist() == prompt  # what the model is given later
            answers = sum(message.role == "assistant" for message in messages)
            assert labels.count(end) == (answers if all_answers else 1)
            assert ids.count(1) == (1 if name in ("llama3", "mistral", "gemma") else 0)  # no second <s>


def test_marks_give_the_mask_of_transformers() -> None:
    tokenizer = chat_tokenizer("chatml_marked")
    messages = conversation(*TURNS, system="Be brief.")
    (found,) = ChatTemplate(tokenizer, "it").encode([example(messages)], ROOMY)
    theirs = tokenizer.apply_chat_template(
        as_rows(messages), return_dict=True, return_assistant_tokens_mask=True
    )
    whole = [*found.prompt, *found.answer]
    assert theirs["input_ids"][: len(whole)] == whole
    learnt = {*found.answers, *range(len(found.prompt), len(whole))}
    assert [position in learnt for position in range(len(theirs["input_ids"]))] == [
        bool(one) for one in theirs["assistant_masks"]
    ]


def test_an_end_token_that_takes_space_along() -> None:
    """As Phi-3's, whose control tokens strip the space behind them."""
    from transformers import AddedToken

    tokenizer = chat_tokenizer("phi3")
    for token in CONTROL["phi3"]:
        tokenizer.add_tokens(AddedToken(token, special=True, rstrip=True), special_tokens=True)
    messages = conversation(*TURNS)
    (found,) = ChatTemplate(tokenizer, "it").encode([example(messages)], ROOMY)
    assert (
        found.prompt
        == tokenizer.apply_chat_template(as_rows(messages[:-1]), add_generation_prompt=True)["input_ids"]
    )
    learnt = tokenizer.decode([found.prompt[place] for place in found.answers])
    assert learnt == f"{TURNS[1]}<|end|>{TURNS[3]}<|end|>"
    assert tokenizer.decode(found.answer) == f"{TURNS[5]}<|end|>"


def test_a_prompt_that_ends_with_space_is_the_one_that_is_continued() -> None:
    """ " It" is one token, but the prompt has its space already."""
    tokenizer = chat_tokenizer("mistral")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    messages = conversation("What is it?", "It is Ulm.")
    (found,) = ChatTemplate(tokenizer, "it").encode([example(messages)], ROOMY)
    assert (
        found.prompt
        == tokenizer.apply_chat_template(as_rows(messages[:-1]), add_generation_prompt=True)["input_ids"]
    )
    assert tokenizer.decode(found.prompt).endswith("assistant: ")
    assert found.answer == tokenizer("It is Ulm.</s>", add_special_tokens=False)["input_ids"]


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=20).filter(
    str.strip
)


@given(
    st.sampled_from(NAMES), st.lists(TEXT, min_size=2, max_size=6).filter(lambda turns: len(turns) % 2 == 0)
)
@settings(max_examples=60)
def test_prompts_are_those_of_transformers_and_answers_their_texts(name: str, turns: list[str]) -> None:
    tokenizer = TOKENIZERS[name]
    messages = conversation(*turns)
    (found,) = ChatTemplate(tokenizer, name).encode([example(messages)], ROOMY)
    prompt = tokenizer.apply_chat_template(as_rows(messages[:-1]), add_generation_prompt=True)["input_ids"]
    assert found.prompt == prompt
    trims = name in ("llama3", "gemma")
    answer = turns[-1].strip() if trims else turns[-1]
    assert tokenizer.decode(found.answer) == answer + END[name]
    learnt = [found.prompt[place] for place in found.answers]
    assert learnt.count(found.answer[-1]) == len(turns) // 2 - 1
    earlier = "".join((text.strip() if trims else text) + END[name] for text in turns[1:-1:2])
    assert earlier.endswith(tokenizer.decode(learnt)[-3:])


TOKENIZERS = {name: chat_tokenizer(name) for name in NAMES}


# --- templates that cannot serve ---


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "has no chat template"),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "no special token"),
        ("{% for m in messages %}{{ m['content'] }</s>{% endfor %}", "chat template of it"),
        ("{{ messages[-1]['content'] }}</s>", "cannot be told|loses a part"),
        ("{{ messages|length }}{% for m in messages %}{{ m['content'] }}</s>{% endfor %}", "cannot be told"),
        ("{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}"
         "{% endfor %}", "special"),
        ("{% for m in messages %}{% generation %}{{ m['content'] }}</s>{% endgeneration %}"
         "{% endfor %}", "marks 2"),
        ("{{ 1 // 0 }}", "refused by the chat template: .*zero"),
        ("{% for i in range(10 ** 6) %}{% endfor %}", "refused by the chat template: Range too big"),
        ("{% for m in messages %}A{{ m['content'] }}{% if m['role'] == 'assistant' %}{% generation %}x"
         "{% endgeneration %}{% endif %}</s>{% endfor %}", "does not mark all"),
    ],
)  # fmt: skip
def test_refused_templates(text: str | None, said: str) -> None:
    tokenizer = chat_tokenizer("mistral")
    tokenizer.chat_template = text
    with pytest.raises(ModelError, match=said):
        ChatTemplate(tokenizer, "it")


def test_marks_without_the_end_token_are_extended_by_it() -> None:
    tokenizer = chat_tokenizer("chatml_marked")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content'] + '<|im_end|>' }}{%- endgeneration %}",
        "message['content'] }}{%- endgeneration %}{{- '<|im_end|>' }}",
    )
    usual = ChatTemplate(chat_tokenizer("chatml_marked"), "it")
    asked = [example(conversation(*TURNS))]
    assert list(ChatTemplate(tokenizer, "it").encode(asked, ROOMY)) == list(usual.encode(asked, ROOMY))


@pytest.mark.parametrize(
    ("name", "messages", "said"),
    [
        ("mistral", conversation("a", "b", system="c"), "refused by the chat template: .*must alternate"),
        ("gemma", conversation("a", "b", system="c"), "System role not supported"),
        (
            "mistral",
            [Message("user", "a"), Message("user", "b"), Message("assistant", "c")],
            "must alternate",
        ),
        ("chatml", conversation("a <|im_end|> b", "c"), "control token '<|im_end|>' in message 1"),
        ("chatml", conversation("a", "b</s>"), "control token '</s>' in message 2"),
        (
            "phi3",
            [Message("user", "a"), Message("tool", "bee"), Message("assistant", "c")],
            "part of message 2",
        ),
    ],
)
def test_refused_conversations(name: str, messages: list[Message], said: str) -> None:
    chat = ChatTemplate(chat_tokenizer(name), name)
    with pytest.raises(DataError, match=r"a.jsonl, line 3: the conversation .*" + said.replace("|", r"\|")):
        list(chat.encode([example(messages, "a.jsonl, line 3")], ROOMY))


def test_two_users_turns_where_the_template_takes_them() -> None:
    messages = [Message("user", "a cat"), Message("user", "b"), Message("assistant", "c")]
    tokenizer = chat_tokenizer("chatml")
    (found,) = ChatTemplate(tokenizer, "it").encode([example(messages)], ROOMY)
    assert ([*found.prompt, *found.answer], found.answers) == (
        by_pieces("chatml", tokenizer, messages)[0],
        [],
    )


# --- truncation ---


@pytest.mark.parametrize("name", NAMES)
def test_truncation_drops_whole_exchanges(name: str) -> None:
    tokenizer = chat_tokenizer(name)
    chat = ChatTemplate(tokenizer, name)
    system = "Be brief." if name in WITH_SYSTEM else None

    def prompt(*turns: str) -> list[int]:
        rows = as_rows(conversation(*turns, system=system))
        return list(tokenizer.apply_chat_template(rows, add_generation_prompt=True)["input_ids"])

    whole, two, one = prompt(*TURNS[:5]), prompt(*TURNS[2:5]), prompt(TURNS[4])
    asked = example(conversation(*TURNS, system=system), "a.jsonl, line 1")
    for limit, kept in ((len(whole), whole), (len(whole) - 1, two), (len(two), two), (len(one), one)):
        data = DataSettings(task="chat", max_length=limit)
        (found,) = chat.encode([asked], data)
        lost = len(whole) - len(kept)
        assert (found.prompt, found.lost) == (kept, {EXCHANGES: lost} if lost else {})
        counted = count_cuts(tokenizer, {"train": [("a", [asked])]}, data, Reading(chat=chat))
        assert counted == {"train": CutCount(1, int(lost > 0), {EXCHANGES: lost} if lost else {}, 0, 0)}
    (sentence,) = in_words({"train": CutCount(9, 1, {EXCHANGES: 7})})
    assert sentence == (
        "inputs longer than data.max_length are cut: 1 of 9 train (7 tokens of oldest exchanges); whole "
        "exchanges, the oldest first"
    )
    with pytest.raises(DataError, match=rf"line 1: the conversation takes {len(one)} tokens with its last"):
        list(chat.encode([asked], DataSettings(task="chat", max_length=len(one) - 1)))


def test_a_long_answer_loses_its_end_and_its_end_token() -> None:
    tokenizer = chat_tokenizer("chatml")
    chat = ChatTemplate(tokenizer, "it")
    asked = example(conversation("Why?", "It is a small old house near that town."))
    (whole,) = chat.encode([asked], ROOMY)
    data = DataSettings(task="chat", max_target_length=len(whole.answer) - 1)
    (cut,) = chat.encode([asked], data)
    assert (cut.answer, cut.lost) == (whole.answer[:-1], {"(target)": 1})
    counted = count_cuts(tokenizer, {"test": [("", [asked])]}, data, Reading(chat=chat))
    assert counted["test"] == CutCount(1, 0, {}, 1, 1)


def test_packed_examples_keep_the_places_of_answers() -> None:
    tokenizer = chat_tokenizer("chatml")
    task = LearningTask("generation", chat=True)
    some = [example(conversation(*TURNS[:count])) for count in (2, 4, 6)]
    tokens = tokenize(
        some, tokenizer, task, ROOMY, sequence_to_sequence=False, chat=ChatTemplate(tokenizer, "it")
    )
    before, after = (
        collate(rows, 0, task, sequence_to_sequence=False, all_answers=True)
        for rows in (tokens, packed(tokens, in_memory=0))
    )
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_control_token_in_the_recipes_system_message_is_no_rows_fault() -> None:
    template = ChatTemplate(chat_tokenizer("chatml"), "it")
    data = DataSettings(source="x", task="chat", system="You are <|im_end|>")
    with pytest.raises(DataError, match=r"^data\.system: holds the control token '<\|im_end\|>'"):
        list(template.encode([Example("a", target="b")], data))
