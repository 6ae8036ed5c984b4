"""Preference pairs: the forms of their rows, what is refused, and their tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcustom.core.errors import DataError
from fedcustom.data.build import build_data, check_first_rows
from fedcustom.data.chat_template import ChatTemplate
from fedcustom.data.conversations import Message
from fedcustom.data.encode import refuse_conversations
from fedcustom.data.examples import Example, LearningTask
from fedcustom.data.inputs import input_example
from fedcustom.data.settings import ClientSettings, DataSettings
from fedcustom.data.tokens import paired, tokenize
from fedcustom.data.truncation import CutCount
from fedcustom.data.truncation_count import Reading, count_cuts
from helpers.chat import END, chat_tokenizer
from helpers.preferences import assistant, user
from helpers.rows import write_jsonl

CLIENTS = ClientSettings(
    partition="iid", count=1, minimum_examples=1, development_fraction=0, test_fraction=0
)

ASKED, GOOD, BAD = "Is the cat old?", "No.", "Well, it depends on the cat."


def read(folder: Path, rows: list[dict[str, Any]], **data: Any) -> list[Example]:
    file = write_jsonl(folder / "train.jsonl", rows)
    settings = DataSettings(source=str(file), task="preference", **data)
    check_first_rows(settings, CLIENTS)
    (client,) = build_data(settings, CLIENTS, 0).clients.values()
    return sorted(client.train, key=lambda example: example.where)


@pytest.mark.parametrize(
    ("row", "data"),
    [
        ({"prompt": ASKED, "chosen": GOOD, "rejected": BAD}, {}),
        ({"prompt": [user(ASKED)], "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]}, {}),
        ({"prompt": [user(ASKED)], "chosen": GOOD, "rejected": [assistant(BAD)]}, {}),
        ({"chosen": [user(ASKED), assistant(GOOD)], "rejected": [user(ASKED), assistant(BAD)]}, {}),
        # As UltraFeedback has it: the prompt's text, and whole conversations.
        (
            {"prompt": ASKED, "chosen": [user(ASKED), assistant(GOOD)],
             "rejected": [user(ASKED), assistant(BAD)]},
            {},
        ),
        ({"source": ASKED, "chosen": GOOD, "rejected": BAD}, {}),
        (
            {"animal": "cat", "yes": "No", "no": "Well, it depends on the cat"},
            {"prompt": "Is the {animal} old?", "chosen": "{yes}.", "rejected": "{no}."},
        ),
    ],
    ids=["texts", "lists", "mixed", "whole", "whole with a prompt", "source", "templates"],
)  # fmt: skip
def test_forms_of_rows(tmp_path: Path, row: dict[str, Any], data: dict[str, str]) -> None:
    (found,) = read(tmp_path, [row], **data)
    assert found == Example(
        ASKED, target=GOOD, references=(GOOD,), messages=(Message("user", ASKED),), rejected=BAD
    )
    assert found.where.endswith("train.jsonl, train, line 1")


def test_a_system_message_and_earlier_exchanges_are_part_of_the_prompt(tmp_path: Path) -> None:
    before = [user("Hello"), assistant("Good day."), user(ASKED)]
    row = {"chosen": [*before, assistant(GOOD)], "rejected": [*before, assistant(BAD)]}
    (found,) = read(tmp_path, [row], system="Be brief.")
    roles = ("system", "user", "assistant", "user")
    assert tuple(message.role for message in found.messages) == roles
    assert (found.text, found.target, found.rejected) == (ASKED, GOOD, BAD)


FINE = {"prompt": ASKED, "chosen": GOOD, "rejected": BAD}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": ASKED, "rejected": BAD}, "column 'chosen' is empty"),
        ({**FINE, "chosen": None}, "column 'chosen' is empty"),
        ({**FINE, "rejected": ""}, "column 'rejected' is empty"),
        ({**FINE, "rejected": "  "}, "the text of role 'assistant' is blank"),
        ({**FINE, "prompt": " "}, "the text of role 'user' is blank"),
        ({**FINE, "rejected": f" {GOOD}"}, "chosen and rejected are the same answer"),
        ({**FINE, "chosen": []}, "column 'chosen' holds an empty list"),
        ({**FINE, "chosen": [assistant(" ")]}, "column 'chosen', message 1: content is blank"),
        ({**FINE, "chosen": 3 * [assistant(GOOD)]}, "chosen has 3 messages behind the prompt"),
        ({**FINE, "prompt": [user(ASKED), assistant("No.")]}, "the prompt ends with an answer"),
        ({**FINE, "prompt": [assistant("Hello")]}, "role 'assistant' begins the conversation"),
        ({**FINE, "chosen": [user(ASKED), assistant(GOOD)]}, "chosen is a whole conversation, and"),
        (
            {"prompt": [user(ASKED)], "chosen": [user(ASKED), assistant(GOOD)],
             "rejected": [user(ASKED), assistant(BAD)]},
            "column 'prompt' holds messages, and chosen and rejected begin with role 'user'",
        ),
        (
            {**FINE, "chosen": [user("Why?"), assistant(GOOD)], "rejected": [user("Why?"), assistant(BAD)]},
            "the prompt is none of the messages",
        ),
        (
            {**FINE, "chosen": [user(ASKED), assistant(GOOD)], "rejected": [user("Why?"), assistant(BAD)]},
            "message 1 of chosen and that of rejected differ",
        ),
        (
            {**FINE, "chosen": [user(ASKED), assistant(GOOD), user(ASKED), assistant(GOOD)],
             "rejected": [user(ASKED), assistant(BAD)]},
            "chosen has 4 messages and rejected 2",
        ),
        (
            {**FINE, "chosen": [user(ASKED), assistant(GOOD)], "rejected": [user(ASKED), user(BAD)]},
            "rejected ends with role 'user'; it has to end with an answer",
        ),
    ],
)  # fmt: skip
def test_refused_rows_are_named_with_file_and_line(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=r"train.jsonl(, train)?, line 2: .*" + said):
        read(tmp_path, [FINE, row])


def test_answers_without_a_prompt(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 1: there is no column of a prompt, and chosen and rejected"):
        read(tmp_path, [{"chosen": GOOD, "rejected": BAD}])


def test_a_prompt_of_several_messages_needs_a_template(tmp_path: Path) -> None:
    before = [user("Hello"), assistant("Good day."), user(ASKED)]
    examples = read(tmp_path, [FINE, {**FINE, "prompt": before}])
    with pytest.raises(DataError, match=r"line 2: the prompt is a conversation of 3 messages"):
        refuse_conversations(examples)


def test_tokens_of_both_answers_behind_one_prompt(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer("chatml")
    chat, task = ChatTemplate(tokenizer, "it"), LearningTask("generation", chat=True, preference=True)
    data = DataSettings(task="preference", max_length=100, max_target_length=100)

    def of(examples: Any) -> Any:
        return tokenize(examples, tokenizer, task, data, sequence_to_sequence=False, chat=chat)

    (row,) = paired(read(tmp_path, [FINE]), of)
    assert row.rejected is not None
    prompt = tokenizer.apply_chat_template([user(ASKED)], add_generation_prompt=True)["input_ids"]
    assert row.source.tolist() == row.other().source.tolist() == prompt
    assert tokenizer.decode(row.target) == GOOD + END["chatml"]
    assert tokenizer.decode(row.other().target) == BAD + END["chatml"]
    assert row.length == 2 * len(prompt) + len(row.target) + len(row.rejected.target)
    assert np.isnan(row.rejected.reference).all()  # nobody has asked the reference model yet


def test_cut_answers_are_counted_once_a_pair(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer("chatml")
    chat = ChatTemplate(tokenizer, "it")
    long = f"{BAD} Yes."
    examples = read(tmp_path, [FINE, {**FINE, "chosen": GOOD, "rejected": long}])
    lengths = {
        text: len(tokenizer(text + END["chatml"], add_special_tokens=False)["input_ids"])
        for text in (GOOD, BAD, long)
    }
    limit = lengths[GOOD]
    data = DataSettings(task="preference", max_length=100, max_target_length=limit)
    (found,) = count_cuts(tokenizer, {"train": [("a", examples)]}, data, Reading(chat=chat)).values()
    assert found == CutCount(2, 0, {}, 2, lengths[BAD] + lengths[long] - 2 * limit)
    plain = count_cuts(tokenizer, {"train": [("a", examples)]}, data, Reading())["train"]
    assert (plain.examples, plain.targets) == (2, 2)


def test_pairs_that_are_one_when_they_are_cut(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer("chatml")
    chat, task = ChatTemplate(tokenizer, "it"), LearningTask("generation", chat=True, preference=True)
    examples = read(tmp_path, [FINE, {**FINE, "chosen": BAD, "rejected": f"{BAD} Yes."}])
    limit = len(tokenizer(GOOD + END["chatml"], add_special_tokens=False)["input_ids"])
    data = DataSettings(task="preference", max_length=100, max_target_length=limit)
    said = r"line 2: chosen and rejected are the same in their first tokens"
    for reading in (Reading(chat=chat), Reading()):  # before any round
        with pytest.raises(DataError, match=said):
            count_cuts(tokenizer, {"train": [("a", examples)]}, data, reading)
    with pytest.raises(DataError, match=said):
        paired(
            examples,
            lambda some: tokenize(some, tokenizer, task, data, sequence_to_sequence=False, chat=chat),
        )


@pytest.mark.parametrize(
    "item",
    [
        ASKED,
        FINE,
        {"prompt": [user(ASKED)]},
        {"messages": [user(ASKED)]},
        {"messages": [user(ASKED), assistant(GOOD)]},
        {"chosen": [user(ASKED), assistant(GOOD)], "rejected": [user(ASKED), assistant(BAD)]},
    ],
)
def test_new_inputs(item: Any) -> None:
    found = input_example(DataSettings(task="preference"), item, 0)
    assert (found.messages, found.text, found.target) == ((Message("user", ASKED),), ASKED, "")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"task": "chat", "chosen": "{a}"}, "data.chosen: has a meaning for data.task = 'preference' alone"),
        ({"task": "generation", "system": "a"}, "data.system: .* 'chat' or 'preference' alone"),
        (
            {"task": "preference", "messages": "a"},
            "data.messages: .* 'chat' alone",
        ),
        ({"task": "preference", "target": "{a}"}, "data.target: has no meaning for data.task = 'preference'"),
        (
            {"task": "preference", "references": "a"},
            "data.references: has a meaning for data.task = 'generation' or 'chat'",
        ),
        ({"task": "preference", "truncate": "keep-end"}, "loses its oldest exchanges"),
        ({"task": "preference", "chosen": "{a[0]}"}, "a.0."),
    ],
)
def test_refused_settings(data: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DataSettings(**data)
